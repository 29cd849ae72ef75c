// Checks the PTX wrappers on a GPU. Needs nothing but the CUDA toolkit; CONTRIBUTING.md tells how
// to build it. Prints a line for each primitive and ends with the number of failures.
#include <cstdio>
#include <exception>

#include "tests/emulation/persistent_kernel.cuh"
#include "tests/emulation/primitives_kernels.cuh"

namespace {

bool passes(const char* name, std::string (*check)()) {
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
    failures += !passes(test.name, test.check);
  failures += !passes("a persistent kernel", rnn_fused::persistent_tests::check_persistent);
  return failures;
}
