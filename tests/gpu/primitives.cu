// Checks the PTX wrappers on a GPU. Needs nothing but the CUDA toolkit; CONTRIBUTING.md tells how
// to build it. Prints a line for each primitive and ends with the number of failures.
#include <cstdio>
#include <exception>

#include "tests/emulation/persistent_kernel.cuh"
#include "tests/emulation/primitives_kernels.cuh"

namespace {

int capability() {
  int device = 0, major = 0, minor = 0;
  CHECK_CUDA("test", cudaGetDevice(&device));
  CHECK_CUDA("test", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  CHECK_CUDA("test", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

bool passes(const char* name, std::string (*check)(), int needs = 80) {
  if (capability() < needs) {
    std::printf("%-40s left out: needs compute capability %d\n", name, needs);
    return true;
  }
  std::string error;
  try {
    error = check();
  } catch (const std::exception& e) {
    error = e.what();
  }
  std::printf("%-40s %s\n", name, error.empty() ? "ok" : error.c_str());
  return error.empty();
}

}  // namespace

int main() {
  int failures = 0;
  for (const auto& test : rnn_fused::primitive_tests::kCases)
    failures += !passes(test.name, test.check, test.capability);
  failures += !passes("a persistent kernel", rnn_fused::persistent_tests::check_persistent);
  return failures;
}
