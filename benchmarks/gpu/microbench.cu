// What one timestep of a persistent RNN kernel pays on this GPU, measured without any RNN:
// barriers, hand-offs of h through L2 and through distributed shared memory, reading h, launching
// kernels.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a microbench.cu -o microbench
//   ./microbench GROUP [STEPS]
//   GROUP: device | launch | barrier | pair | handoff | broadcast | cluster | push
//
// Prints one JSON object per line and result; `us` is the median over launches of the time of one
// step inside the kernel. Every launch draws a new seed, starts from poisoned buffers, and counts
// on the device both the values it compared and those that were wrong; a result whose counts are
// not the expected ones has "ok": false and an "error". Exit code 1 if there is any such result.
#include "microbench_kernels.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define CUDA_CHECK(call)                                                                           \
  do {                                                                                             \
    const cudaError_t status_ = (call);                                                            \
    if (status_ != cudaSuccess)                                                                    \
      throw std::runtime_error(std::string("line ") + std::to_string(__LINE__) + ": " #call ": " + \
                               cudaGetErrorString(status_));                                       \
  } while (0)

namespace {

constexpr int kWarmups = 2;
constexpr int kLaunches = 9;

class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) { CUDA_CHECK(cudaMalloc(&data_, bytes)); }
  ~Buffer() { cudaFree(data_); }  // an earlier error already explains a failure here
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  void fill(int byte, cudaStream_t stream) const {
    CUDA_CHECK(cudaMemsetAsync(data_, byte, bytes_, stream));
  }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

struct Shape {
  unsigned blocks;
  unsigned cluster = 1;  // blocks per cluster
  unsigned shared = 0;   // bytes of dynamic shared memory
  bool cooperative = false;
  unsigned threads = kThreads;
};

struct Config {
  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute attribute{};
  Config(const Shape& shape, cudaStream_t stream) {
    launch.gridDim = dim3(shape.blocks);
    launch.blockDim = dim3(shape.threads);
    launch.dynamicSmemBytes = shape.shared;
    launch.stream = stream;
    launch.attrs = &attribute;
    launch.numAttrs = 1;
    if (shape.cooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = shape.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      if (shape.cluster == 1) launch.numAttrs = 0;
    }
  }
  Config(const Config&) = delete;
  Config& operator=(const Config&) = delete;
};

struct Outcome {
  double us = 0, us_min = 0, us_max = 0;
  std::string error;  // empty: every launch checked out
};

std::string text(const char* key, const std::string& value) {
  return std::string("\"") + key + "\": \"" + value + "\", ";
}

std::string number(const char* key, double value) {
  char out[64];
  std::snprintf(out, sizeof out, "\"%s\": %.10g, ", key, value);
  return out;
}

std::string quotable(std::string s) {
  for (char& c : s)
    if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < 32) c = '\'';
  return s;
}

class Bench {
 public:
  explicit Bench(unsigned steps)
      : report_(sizeof(Report)), steps(steps), rng(std::random_device{}()) {
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreate(&start_));
    CUDA_CHECK(cudaEventCreate(&stop_));
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&value, which, 0));
    return value;
  }

  // As Shape::shared: leaves room for one block on an SM, as a persistent kernel has it.
  unsigned alone() const { return static_cast<unsigned>(device.sharedMemPerMultiprocessor / 2); }

  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), const Shape& shape, Args... args) const {
    if (shape.shared > 0)
      CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shape.shared)));
    const Config config(shape, stream);
    CUDA_CHECK(cudaLaunchKernelEx(&config.launch, kernel, static_cast<Params>(args)...));
    CUDA_CHECK(cudaGetLastError());
  }

  // Times run(seed, report), which does `per_launch` steps and must check `expected` values;
  // prepare(seed) poisons the buffers outside the timed region, verify() adds a host-side check.
  template <class Prepare, class Run, class Verify>
  Outcome measure(unsigned per_launch, unsigned long long expected, Prepare prepare, Run run,
                  Verify verify) {
    std::vector<double> us;
    for (int i = -kWarmups; i < kLaunches; ++i) {
      const auto seed = static_cast<unsigned>(rng());
      report_.fill(0, stream);
      prepare(seed);
      CUDA_CHECK(cudaEventRecord(start_, stream));
      run(seed, report_.as<Report>());
      CUDA_CHECK(cudaEventRecord(stop_, stream));
      CUDA_CHECK(cudaStreamSynchronize(stream));
      Report found;
      CUDA_CHECK(cudaMemcpy(&found, report_.as<Report>(), sizeof found, cudaMemcpyDeviceToHost));
      if (found.timeouts || found.wrong || found.checked != expected || !verify(seed))
        return {0, 0, 0,
                std::to_string(found.wrong) + " wrong values, " + std::to_string(found.timeouts) +
                    " timeouts, " + std::to_string(found.checked) + " of " +
                    std::to_string(expected) + " values checked, or a wrong sum"};
      float ms = 0;
      CUDA_CHECK(cudaEventElapsedTime(&ms, start_, stop_));
      if (i >= 0) us.push_back(1e3 * ms / per_launch);
    }
    std::sort(us.begin(), us.end());
    return {us[us.size() / 2], us.front(), us.back(), ""};
  }

  template <class Prepare, class Run>
  Outcome measure(unsigned per_launch, unsigned long long expected, Prepare prepare, Run run) {
    return measure(per_launch, expected, prepare, run, [](unsigned) { return true; });
  }

  void emit(const char* bench, const std::string& fields, const Outcome& outcome) {
    failed = failed || !outcome.error.empty();
    std::string line = "{" + text("bench", bench) + fields;
    if (outcome.error.empty())
      line += number("us", outcome.us) + number("us_min", outcome.us_min) +
              number("us_max", outcome.us_max) + "\"ok\": true}";
    else
      line += text("error", quotable(outcome.error)) + "\"ok\": false}";
    std::puts(line.c_str());
    std::fflush(stdout);
  }

 private:
  Buffer report_;
  cudaEvent_t start_{}, stop_{};

 public:
  const unsigned steps;
  std::mt19937 rng;
  cudaDeviceProp device{};
  cudaStream_t stream{};
  bool failed = false;
};

// The facts a plan needs beside the times.
void run_device(Bench& bench) {
  const cudaDeviceProp& d = bench.device;
  std::printf(
      "{\"bench\": \"device\", \"name\": \"%s\", \"capability\": \"%d.%d\", \"sms\": %d, "
      "\"l2_bytes\": %d, \"memory_bytes\": %zu, \"shared_per_block_optin\": %zu, "
      "\"shared_per_sm\": %zu, \"registers_per_sm\": %d, \"clock_khz\": %d, "
      "\"cooperative\": %d, \"clusters\": %d, \"ok\": true}\n",
      quotable(d.name).c_str(), d.major, d.minor, d.multiProcessorCount, d.l2CacheSize,
      d.totalGlobalMem, d.sharedMemPerBlockOptin, d.sharedMemPerMultiprocessor,
      d.regsPerMultiprocessor, bench.attribute(cudaDevAttrClockRate),
      bench.attribute(cudaDevAttrCooperativeLaunch), bench.attribute(cudaDevAttrClusterLaunch));
  std::fflush(stdout);
}

// A chain of dependent small kernels, as the stepwise family launches: from a stream, and replayed
// from a captured graph.
void run_launch(Bench& bench) {
  const Shape shape{static_cast<unsigned>(bench.device.multiProcessorCount)};
  const unsigned chain = std::min(bench.steps, 1000u);
  const Buffer counters(shape.blocks * sizeof(unsigned));
  const auto prepare = [&](unsigned) { counters.fill(0, bench.stream); };
  const auto verify = [&](unsigned) {
    std::vector<unsigned> host(shape.blocks);
    CUDA_CHECK(cudaMemcpy(host.data(), counters.as<unsigned>(), host.size() * sizeof(unsigned),
                          cudaMemcpyDeviceToHost));
    return std::all_of(host.begin(), host.end(), [&](unsigned n) { return n == chain; });
  };
  const auto enqueue = [&] {
    for (unsigned i = 0; i < chain; ++i) bench.launch(tick_kernel, shape, counters.as<unsigned>());
  };
  const std::string fields = number("blocks", shape.blocks) + number("steps", chain);
  bench.emit("launch", text("how", "stream") + fields,
             bench.measure(chain, 0, prepare, [&](unsigned, Report*) { enqueue(); }, verify));

  cudaGraph_t graph{};
  cudaGraphExec_t replay{};
  CUDA_CHECK(cudaStreamBeginCapture(bench.stream, cudaStreamCaptureModeGlobal));
  enqueue();
  CUDA_CHECK(cudaStreamEndCapture(bench.stream, &graph));
  CUDA_CHECK(cudaGraphInstantiateWithFlags(&replay, graph, 0));
  const auto run = [&](unsigned, Report*) { CUDA_CHECK(cudaGraphLaunch(replay, bench.stream)); };
  bench.emit("launch", text("how", "graph") + fields,
             bench.measure(chain, 0, prepare, run, verify));
  CUDA_CHECK(cudaGraphExecDestroy(replay));
  CUDA_CHECK(cudaGraphDestroy(graph));
}

// Numbers of blocks, the first of them one for every SM of the chip.
std::vector<unsigned> grid_sizes(const Bench& bench) {
  if (!bench.attribute(cudaDevAttrCooperativeLaunch))
    throw std::runtime_error("this device has no cooperative launch");
  const auto sms = static_cast<unsigned>(bench.device.multiProcessorCount);
  std::vector<unsigned> sizes{sms};
  for (unsigned blocks : {64u, 32u, 16u})
    if (blocks < sms) sizes.push_back(blocks);
  return sizes;
}

template <Barrier kBarrier, bool kExchange>
void run_barrier(Bench& bench, const char* kind) {
  for (unsigned blocks : grid_sizes(bench)) {
    const Shape shape{blocks, 1, bench.alone(), true};
    const size_t vectors = blocks * 8;
    const Buffer sync(blocks * sizeof(unsigned)), h(2 * vectors * sizeof(uint4));
    const auto prepare = [&](unsigned) {
      sync.fill(0, bench.stream);
      h.fill(0xFF, bench.stream);
    };
    const auto run = [&](unsigned seed, Report* report) {
      bench.launch(barrier_kernel<kBarrier, kExchange>, shape, sync.as<unsigned>(), h.as<uint4>(),
                   seed, bench.steps, report);
    };
    const unsigned long long exchanges = kExchange ? bench.steps : 1;
    bench.emit("barrier",
               text("how", kind) + number("exchange_bytes", kExchange ? vectors * 16.0 : 0) +
                   number("blocks", blocks) + number("steps", bench.steps),
               bench.measure(bench.steps, exchanges * vectors * blocks, prepare, run));
  }
}

void run_barriers(Bench& bench) {
  run_barrier<Barrier::kGridSync, false>(bench, "grid_sync");
  run_barrier<Barrier::kGridSync, true>(bench, "grid_sync");
  run_barrier<Barrier::kCounter, false>(bench, "counter");
  run_barrier<Barrier::kCounter, true>(bench, "counter");
  run_barrier<Barrier::kFlags, false>(bench, "flags");
  run_barrier<Barrier::kFlags, true>(bench, "flags");
}

// One-way latency of a flagged word between two SMs, over partners spread across the chip.
template <class Word>
void run_pair(Bench& bench) {
  const unsigned blocks = grid_sizes(bench).front();
  const Shape shape{blocks, 1, bench.alone(), true};
  const Buffer mail(2 * 16 * sizeof(Word));
  const auto prepare = [&](unsigned) { mail.fill(0xFF, bench.stream); };
  std::vector<double> us;
  Outcome outcome;
  for (unsigned partner = 1; partner < blocks && outcome.error.empty(); partner += 8) {
    const auto run = [&](unsigned seed, Report* report) {
      bench.launch(pair_kernel<Word>, shape, mail.as<Word>(), partner, seed, bench.steps, report);
    };
    outcome = bench.measure(2 * bench.steps, 2ull * bench.steps, prepare, run);
    us.push_back(outcome.us);
  }
  std::sort(us.begin(), us.end());
  if (outcome.error.empty()) outcome = {us[us.size() / 2], us.front(), us.back(), ""};
  bench.emit("pair",
             number("word_bytes", sizeof(Word)) + number("partners", us.size()) +
                 number("steps", bench.steps),
             outcome);
}

template <class Word>
void run_handoff(Bench& bench) {
  for (unsigned blocks : grid_sizes(bench)) {
    for (unsigned payload : {1u << 10, 1u << 12, 1u << 14, 1u << 16, 1u << 17}) {
      const Shape shape{blocks, 1, bench.alone(), true};
      const unsigned words = (payload + blocks * Word::kPayload - 1) / (blocks * Word::kPayload);
      const size_t total = static_cast<size_t>(blocks) * words;
      const Buffer mail(2 * total * sizeof(Word));
      const auto prepare = [&](unsigned) { mail.fill(0xFF, bench.stream); };
      const auto run = [&](unsigned seed, Report* report) {
        bench.launch(handoff_kernel<Word>, shape, mail.as<Word>(), words, seed, bench.steps,
                     report);
      };
      bench.emit("handoff",
                 number("word_bytes", sizeof(Word)) + number("payload_bytes", payload) +
                     number("blocks", blocks) + number("steps", bench.steps),
                 bench.measure(bench.steps, total * blocks * bench.steps, prepare, run));
    }
  }
}

void run_broadcast(Bench& bench) {
  const Shape shape{grid_sizes(bench).front(), 1, bench.alone(), true, kReaders};
  constexpr unsigned kBuffers = 4;
  for (unsigned bytes = 1u << 11; bytes <= 1u << 19; bytes *= 2) {
    const unsigned vectors = bytes / sizeof(uint4), words = bytes / sizeof(unsigned);
    const Buffer h(size_t{kBuffers} * bytes), sums(shape.blocks * sizeof(unsigned));
    unsigned expected = 0;
    const auto prepare = [&](unsigned seed) {
      std::mt19937 random(seed);
      std::vector<unsigned> values(size_t{kBuffers} * words);
      expected = 0;
      for (size_t i = 0; i < values.size(); ++i) {
        const unsigned buffer = static_cast<unsigned>(i / words);
        const unsigned reads = (bench.steps + kBuffers - 1 - buffer) / kBuffers;
        values[i] = static_cast<unsigned>(random());
        expected += values[i] * reads;
      }
      CUDA_CHECK(cudaMemcpyAsync(h.as<unsigned>(), values.data(), values.size() * sizeof(unsigned),
                                 cudaMemcpyHostToDevice, bench.stream));
      sums.fill(0, bench.stream);
      CUDA_CHECK(cudaStreamSynchronize(bench.stream));  // values may go
    };
    const auto kernel = vectors >= 4 * kReaders   ? broadcast_kernel<4>
                        : vectors >= 2 * kReaders ? broadcast_kernel<2>
                                                  : broadcast_kernel<1>;
    const auto run = [&](unsigned, Report* report) {
      bench.launch(kernel, shape, h.as<uint4>(), vectors, kBuffers, bench.steps,
                   sums.as<unsigned>(), report);
    };
    const auto verify = [&](unsigned) {
      std::vector<unsigned> host(shape.blocks);
      CUDA_CHECK(cudaMemcpy(host.data(), sums.as<unsigned>(), host.size() * sizeof(unsigned),
                            cudaMemcpyDeviceToHost));
      return std::all_of(host.begin(), host.end(), [&](unsigned sum) { return sum == expected; });
    };
    const unsigned long long checked = 1ull * vectors * bench.steps * shape.blocks;
    bench.emit(
        "broadcast",
        number("bytes", bytes) + number("blocks", shape.blocks) + number("steps", bench.steps),
        bench.measure(bench.steps, checked, prepare, run, verify));
  }
}

// How many clusters of this shape the chip holds at once; 0 where it cannot hold any.
template <class Kernel>
unsigned resident_clusters(const Bench& bench, Kernel* kernel, Shape shape) {
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shape.shared)));
  shape.blocks = shape.cluster;
  const Config config(shape, bench.stream);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config.launch) != cudaSuccess) {
    cudaGetLastError();  // an unsupported cluster size is an answer here, not a fault
    return 0;
  }
  return static_cast<unsigned>(clusters);
}

// Emits one cluster result for a lone cluster and one for a full chip. run(shape, seed, report);
// `checked` values are compared per block and launch.
template <class Kernel, class Run>
void measure_clusters(Bench& bench, const char* name, std::string fields, Kernel* kernel,
                      Shape shape, unsigned long long checked, Run run) {
  shape.shared = std::max(shape.shared, bench.alone());
  const unsigned most = resident_clusters(bench, kernel, shape);
  fields += number("cluster", shape.cluster) + number("resident_clusters", most) +
            number("steps", bench.steps);
  if (most == 0) {
    std::printf("{%s%s\"skipped\": \"does not fit this device\", \"ok\": true}\n",
                text("bench", name).c_str(), fields.c_str());
    std::fflush(stdout);
    return;
  }
  for (unsigned clusters : {1u, most}) {
    shape.blocks = clusters * shape.cluster;
    bench.emit(name, fields + number("clusters", clusters),
               bench.measure(
                   bench.steps, checked * shape.blocks, [](unsigned) {},
                   [&](unsigned seed, Report* report) { run(shape, seed, report); }));
  }
}

void require_clusters(const Bench& bench) {
  if (!bench.attribute(cudaDevAttrClusterLaunch))
    throw std::runtime_error("this device has no thread-block clusters");
}

template <ClusterBarrier kBarrier>
void run_cluster(Bench& bench, const char* kind) {
  require_clusters(bench);
  const unsigned checked = kBarrier == ClusterBarrier::kExchange ? bench.steps : 1;
  for (unsigned size : {2u, 4u, 8u, 16u})
    measure_clusters(bench, "cluster", text("how", kind), cluster_kernel<kBarrier>,
                     Shape{size, size}, checked,
                     [&](const Shape& shape, unsigned seed, Report* report) {
                       bench.launch(cluster_kernel<kBarrier>, shape, seed, bench.steps, report);
                     });
}

template <Push kPush>
void run_push(Bench& bench, const char* kind) {
  require_clusters(bench);
  for (unsigned size : {2u, 4u, 8u, 16u}) {
    for (unsigned bytes : {1u << 11, 1u << 13, 1u << 15, 1u << 16}) {
      const unsigned vectors = bytes / sizeof(uint4);
      const unsigned shared = 2 * bytes + (kPush == Push::kBulk ? 2 * bytes / size : 0);
      if (shared + 1024 > bench.device.sharedMemPerBlockOptin) continue;
      measure_clusters(bench, "push", text("how", kind) + number("bytes", bytes),
                       push_kernel<kPush>, Shape{size, size, shared}, 1ull * vectors * bench.steps,
                       [&](const Shape& shape, unsigned seed, Report* report) {
                         bench.launch(push_kernel<kPush>, shape, vectors, seed, bench.steps,
                                      report);
                       });
    }
  }
}

void run_group(Bench& bench, const std::string& group) {
  if (group == "device") {
    run_device(bench);
  } else if (group == "launch") {
    run_launch(bench);
  } else if (group == "barrier") {
    run_barriers(bench);
  } else if (group == "pair") {
    run_pair<Word8>(bench);
    run_pair<Word16>(bench);
  } else if (group == "handoff") {
    run_handoff<Word8>(bench);
    run_handoff<Word16>(bench);
  } else if (group == "broadcast") {
    run_broadcast(bench);
  } else if (group == "cluster") {
    run_cluster<ClusterBarrier::kRelaxed>(bench, "relaxed");
    run_cluster<ClusterBarrier::kRelease>(bench, "release");
    run_cluster<ClusterBarrier::kExchange>(bench, "exchange");
  } else if (group == "push") {
    run_push<Push::kStore>(bench, "store");
    run_push<Push::kAsync>(bench, "async");
    run_push<Push::kBulk>(bench, "bulk");
  } else {
    throw std::runtime_error("GROUP must be one of those in the head of microbench.cu, got " +
                             group);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string group = argc > 1 ? argv[1] : "";
  try {
    Bench bench(argc > 2 ? std::max(1, std::atoi(argv[2])) : 2000);
    run_group(bench, group);
    return bench.failed ? 1 : 0;
  } catch (const std::exception& error) {
    std::printf("{%s%s\"ok\": false}\n", text("bench", quotable(group)).c_str(),
                text("error", quotable(error.what())).c_str());
    return 1;
  }
}
