// Every primitive in a kernel of its own, checked against plain maths. The same source runs under
// emulation (primitives_test.cpp) and on a GPU (tests/gpu/primitives.cu): a wrapper and its twin
// could share a misreading of a fragment's layout, and only the GPU would tell.
#pragma once

#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "csrc/cuda/primitives.cuh"
#include "tests/emulation/device_array.h"

namespace rnn_fused::primitive_tests {

// One check of a primitive: "" or what went wrong.
struct Case {
  const char* name;
  std::string (*check)();
  int capability = 80;  // that it needs
};

template <class T, class E>
std::string differences(const std::vector<T>& got, E&& expected) {
  for (size_t i = 0; i < got.size(); ++i)
    if (const T wanted = expected(i); !(got[i] == wanted)) {
      std::ostringstream text;
      text << "element " << i << " must be " << wanted << ", got " << got[i];
      return text.str();
    }
  return "";
}

// Small integers without a pattern, exact in every format, as are the sums of their products.
inline int small_integer(uint32_t i) {
  i = (i + 1) * 0x9e3779b9u;
  return static_cast<int>((i ^ i >> 15) % 17) - 8;
}

template <class T>
std::vector<T> small_integers(size_t size, uint32_t first) {
  std::vector<T> values;
  for (size_t i = 0; i < size; ++i) values.push_back(T(float(small_integer(first + i))));
  return values;
}

// ---------------------------------------------------------------------------------------------
// Matrix products. a [16, K], b transposed [8, K], c and d [16, 8]
// ---------------------------------------------------------------------------------------------

constexpr uint32_t kA = 0, kB = 1000, kC = 2000;  // where their small integers begin

inline std::string product_differences(const std::vector<float>& d, int K) {
  return differences(d, [K](size_t i) {
    const uint32_t row = i / 8, column = i % 8;
    int sum = small_integer(kC + i);
    for (int k = 0; k < K; ++k)
      sum += small_integer(kA + row * K + k) * small_integer(kB + column * K + k);
    return static_cast<float>(sum);
  });
}

__device__ inline void load_sums(float (&d)[4], const float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) d[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
}

__device__ inline void store_sums(float* out, const float (&d)[4]) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}

// Fragments as documented, two neighbours in memory to a register.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, const float* c, float* out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](const T* p) { return *reinterpret_cast<const uint32_t*>(p); };
  const uint32_t fragment_a[4] = {pair(&a[g * 16 + 2 * t]), pair(&a[(g + 8) * 16 + 2 * t]),
                                  pair(&a[g * 16 + 2 * t + 8]), pair(&a[(g + 8) * 16 + 2 * t + 8])};
  const uint32_t fragment_b[2] = {pair(&b[g * 16 + 2 * t]), pair(&b[g * 16 + 2 * t + 8])};
  float d[4];
  load_sums(d, c);
  gpu::mma_m16n8k16<T>(d, fragment_a, fragment_b);
  store_sums(out, d);
}

template <class T>
std::string check_mma() {
  DeviceArray<T> a(small_integers<T>(16 * 16, kA)), b(small_integers<T>(8 * 16, kB));
  DeviceArray<float> c(small_integers<float>(16 * 8, kC)), d(16 * 8);
  gpu::launch(mma_kernel<T>, 1, 32, 0, nullptr, a.get(), b.get(), c.get(), d.get());
  return product_differences(d.host(), 16);
}

// Fragments by ldmatrix, as a kernel of a layer loads them.
template <class T>
__global__ void ldmatrix_mma_kernel(const T* a, const T* b, const float* c, float* out) {
  RNN_FUSED_SHARED(T, rows_a, [16][24]);  // 48 bytes: aligned rows that share few banks
  RNN_FUSED_SHARED(T, rows_b, [8][24]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 16; i += 32) rows_a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 8 * 16; i += 32) rows_b[i / 16][i % 16] = b[i];
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  gpu::ldmatrix_x4(fragment_a, &rows_a[lane % 16][lane / 16 * 8]);
  gpu::ldmatrix_x2(fragment_b, &rows_b[lane % 8][lane / 8 % 2 * 8]);
  float d[4];
  load_sums(d, c);
  gpu::mma_m16n8k16<T>(d, fragment_a, fragment_b);
  store_sums(out, d);
}

template <class T>
std::string check_ldmatrix_mma() {
  DeviceArray<T> a(small_integers<T>(16 * 16, kA)), b(small_integers<T>(8 * 16, kB));
  DeviceArray<float> c(small_integers<float>(16 * 8, kC)), d(16 * 8);
  gpu::launch(ldmatrix_mma_kernel<T>, 1, 32, 0, nullptr, a.get(), b.get(), c.get(), d.get());
  return product_differences(d.host(), 16);
}

// The operands come with 13 bits of noise, which the product must not see.
__global__ static void mma_tf32_kernel(const float* a, const float* b, const float* c, float* out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto noisy = [](float x) { return (gpu::to_tf32(x) & ~0x1fffu) | 0x1555u; };
  const uint32_t fragment_a[4] = {noisy(a[g * 8 + t]), noisy(a[(g + 8) * 8 + t]),
                                  noisy(a[g * 8 + t + 4]), noisy(a[(g + 8) * 8 + t + 4])};
  const uint32_t fragment_b[2] = {noisy(b[g * 8 + t]), noisy(b[g * 8 + t + 4])};
  float d[4];
  load_sums(d, c);
  gpu::mma_m16n8k8_tf32(d, fragment_a, fragment_b);
  store_sums(out, d);
}

inline std::string check_mma_tf32() {
  DeviceArray<float> a(small_integers<float>(16 * 8, kA)), b(small_integers<float>(8 * 8, kB));
  DeviceArray<float> c(small_integers<float>(16 * 8, kC)), d(16 * 8);
  gpu::launch(mma_tf32_kernel, 1, 32, 0, nullptr, a.get(), b.get(), c.get(), d.get());
  return product_differences(d.host(), 8);
}

__global__ static void to_tf32_kernel(const float* in, float* out) {
  out[threadIdx.x] = __uint_as_float(gpu::to_tf32(in[threadIdx.x]) & ~0x1fffu);
}

inline std::string check_to_tf32() {
  const std::vector<float> in = {
      1, 1 + 0x1p-10f, 1 + 0x1p-11f,  -1 - 0x1p-11f, 1 + 0x1.8p-12f, 0x1p-3f, 2 - 0x1p-20f,
      0, -3.5f,        1 + 0x1.8p-10f};
  const std::vector<float> rounded = {1, 1 + 0x1p-10f, 1 + 0x1p-10f, -1 - 0x1p-10f, 1, 0x1p-3f, 2,
                                      0, -3.5f,        1 + 0x1p-9f};
  DeviceArray<float> from(in), to(in.size());
  gpu::launch(to_tf32_kernel, 1, in.size(), 0, nullptr, from.get(), to.get());
  return differences(to.host(), [&](size_t i) { return rounded[i]; });
}

// out [3, 32, 4]: the registers of ldmatrix_x4, ldmatrix_x2 and ldmatrix_x4_trans. The element at
// row r and column k of matrix j is 64 * j + 8 * r + k.
__global__ static void ldmatrix_kernel(uint32_t* out) {
  RNN_FUSED_SHARED(uint16_t, matrices, [4][8][8]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 4 * 64; i += 32) matrices[i / 64][i / 8 % 8][i % 8] = i;
  __syncwarp();
  uint32_t x4[4], x2[2], trans[4];
  gpu::ldmatrix_x4(x4, matrices[lane / 8][lane % 8]);
  gpu::ldmatrix_x2(x2, matrices[lane / 8 % 2][lane % 8]);
  gpu::ldmatrix_x4_trans(trans, matrices[lane / 8][lane % 8]);
  for (int j = 0; j < 4; ++j) {
    out[4 * lane + j] = x4[j];
    out[128 + 4 * lane + j] = j < 2 ? x2[j] : 0;
    out[256 + 4 * lane + j] = trans[j];
  }
}

inline std::string check_ldmatrix() {
  DeviceArray<uint32_t> out(3 * 32 * 4);
  gpu::launch(ldmatrix_kernel, 1, 32, 0, nullptr, out.get());
  return differences(out.host(), [](size_t i) -> uint32_t {
    const uint32_t g = i / 16 % 8, t = i / 4 % 4, j = i % 4, matrix = 64 * j;
    const bool transposed = i >= 256, absent = i / 128 == 1 && j >= 2;
    const uint32_t low = transposed ? 8 * (2 * t) + g : 8 * g + 2 * t;
    const uint32_t high = transposed ? 8 * (2 * t + 1) + g : 8 * g + 2 * t + 1;
    return absent ? 0 : (matrix + low) | (matrix + high) << 16;
  });
}

// ---------------------------------------------------------------------------------------------
// Copies
// ---------------------------------------------------------------------------------------------

constexpr int kCopies = 32;  // threads, each with one copy of N bytes in each of two groups

// out [2, kCopies * N / 4]. Of the second group, copies of odd threads are zeros; their source is
// null, which must not be read.
template <int N>
__global__ void cp_async_kernel(const uint32_t* in, uint32_t* out) {
  constexpr int kWords = N / 4, kGroup = kCopies * kWords;
  RNN_FUSED_SHARED(uint32_t, words, [2][kGroup]);
  const int i = threadIdx.x;
  const bool valid = i % 2 == 0;
  gpu::cp_async<N>(&words[0][i * kWords], &in[i * kWords]);
  gpu::cp_async_commit();
  gpu::cp_async_or_zero<N>(&words[1][i * kWords], valid ? &in[kGroup + i * kWords] : nullptr,
                           valid);
  gpu::cp_async_commit();
  gpu::cp_async_wait<1>();
  __syncthreads();
  for (int w = 0; w < kWords; ++w) out[w * kCopies + i] = words[0][w * kCopies + i];
  gpu::cp_async_wait<0>();
  __syncthreads();
  for (int w = 0; w < kWords; ++w) out[kGroup + w * kCopies + i] = words[1][w * kCopies + i];
}

template <int N>
std::string check_cp_async() {
  constexpr int kWords = N / 4, kGroup = kCopies * kWords;
  std::vector<uint32_t> words(2 * kGroup);
  for (size_t i = 0; i < words.size(); ++i) words[i] = i + 1;
  DeviceArray<uint32_t> in(words), out(2 * kGroup);
  gpu::launch(cp_async_kernel<N>, 1, kCopies, 0, nullptr, in.get(), out.get());
  return differences(out.host(), [](size_t i) -> uint32_t {
    const bool zero = i >= kGroup && (i - kGroup) / kWords % 2 == 1;
    return zero ? 0 : i + 1;
  });
}

// ---------------------------------------------------------------------------------------------
// Between threads and blocks
// ---------------------------------------------------------------------------------------------

// out [7, 32]
__global__ static void warp_kernel(int* out) {
  const int lane = threadIdx.x, value = 100 + lane;
  out[lane] = __shfl_sync(~0u, value, lane + 3);
  out[32 + lane] = __shfl_xor_sync(~0u, value, 5);
  out[64 + lane] = __shfl_down_sync(~0u, value, 3);
  out[96 + lane] = __shfl_up_sync(~0u, value, 3);
  out[128 + lane] = __shfl_sync(~0u, value, 1, 8);
  out[160 + lane] = __ballot_sync(~0u, lane % 3 == 0);
  out[192 + lane] = lane < 8 ? __shfl_xor_sync(0xffu, value, 1) + __any_sync(0xffu, lane == 9) : 0;
}

inline std::string check_warp() {
  DeviceArray<int> out(7 * 32);
  gpu::launch(warp_kernel, 1, 32, 0, nullptr, out.get());
  return differences(out.host(), [](size_t i) -> int {
    const int lane = i % 32;
    switch (i / 32) {
      case 0: return 100 + (lane + 3) % 32;
      case 1: return 100 + (lane ^ 5);
      case 2: return 100 + (lane + 3 < 32 ? lane + 3 : lane);
      case 3: return 100 + (lane >= 3 ? lane - 3 : lane);
      case 4: return 100 + lane / 8 * 8 + 1;
      case 5: return 0x49249249;
      default: return lane < 8 ? 100 + (lane ^ 1) : 0;
    }
  });
}

// More dynamic shared memory than a kernel has without asking. out [blocks * threads]
__global__ static void large_shared_kernel(int* out, int size) {
  RNN_FUSED_DYNAMIC_SHARED(int, values);
  const int threads = blockDim.x;
  for (int i = threadIdx.x; i < size; i += threads) values[i] = i + blockIdx.x;
  __syncthreads();
  out[blockIdx.x * threads + threadIdx.x] = values[size - 1 - threadIdx.x];
}

inline std::string check_large_shared() {
  constexpr int kSize = 20'000, kThreads = 64;
  DeviceArray<int> out(2 * kThreads);
  gpu::launch(large_shared_kernel, 2, kThreads, kSize * sizeof(int), nullptr, out.get(), kSize);
  return differences(out.host(), [](size_t i) -> int {
    return kSize - 1 - static_cast<int>(i % kThreads) + static_cast<int>(i / kThreads);
  });
}

// A baton goes through all blocks: flag [blocks], zero; out [blocks].
__global__ static void acquire_release_kernel(uint32_t* flag, uint32_t* out) {
  const uint32_t block = blockIdx.x;
  if (threadIdx.x != 0) return;
  uint32_t sum = 0;
  if (block > 0) {
    while (gpu::load_acquire(&flag[block - 1]) == 0) gpu::spin_pause();
    sum = out[block - 1];
  }
  out[block] = sum + block + 1;
  gpu::store_release(&flag[block], 1);
}

inline std::string check_acquire_release() {
  constexpr int kBlocks = 4;
  DeviceArray<uint32_t> flag(kBlocks), out(kBlocks);
  gpu::fill(flag.get(), 0, flag.bytes(), nullptr);
  gpu::launch_cooperative(1, acquire_release_kernel, kBlocks, 32, 0, nullptr, flag.get(),
                          out.get());
  return differences(out.host(), [](size_t i) -> uint32_t { return (i + 1) * (i + 2) / 2; });
}

// A word with its step as the flag, in memory that is zero at first.
struct Flagged {
  using Word = uint64_t;
  static constexpr int kEmpty = 0;
  __device__ static Word make(uint32_t i, uint32_t step) {
    return (uint64_t{step} << 32) | (i * 1000 + step);
  }
  __device__ static bool is_there(Word word, uint32_t step) { return word >> 32 == step; }
  __device__ static uint32_t value(Word word) { return static_cast<uint32_t>(word); }
  static uint32_t expected(uint32_t from, uint32_t step) { return from * 1000 + step; }
};

// Words that are there when none has all bits set, as all have at first.
struct Blank {
  using Word = uint4;
  static constexpr int kEmpty = 0xff;
  __device__ static Word make(uint32_t i, uint32_t step) {
    return make_uint4(i, step, i * step, 7);
  }
  __device__ static bool is_there(Word word, uint32_t) {
    return max(max(word.x, word.y), max(word.z, word.w)) != 0xffffffff;
  }
  __device__ static uint32_t value(Word word) {
    return word.x + 10 * word.y + 100 * word.z + 1000 * word.w;
  }
  static uint32_t expected(uint32_t from, uint32_t step) {
    return from + 10 * step + 100 * from * step + 7000;
  }
};

// Every block hands `steps` words to the next one, which knows of each by itself that it is there;
// every word is written once. words [steps, blocks * threads], empty; out likewise.
template <class Kind>
__global__ static void handing_kernel(typename Kind::Word* words, uint32_t* out, uint32_t steps) {
  const uint32_t n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  for (uint32_t step = 1; step <= steps; ++step) {
    auto* const row = &words[(step - 1) * n];
    gpu::store_relaxed(&row[i], Kind::make(i, step));
    const auto* const from = &row[(i + blockDim.x) % n];
    auto word = gpu::load_relaxed(from);
    for (; !Kind::is_there(word, step); word = gpu::load_relaxed(from)) gpu::spin_pause();
    out[(step - 1) * n + i] = Kind::value(word);
  }
}

template <class Kind>
std::string check_handing() {
  constexpr int kBlocks = 4, kThreads = 32, kSteps = 3, n = kBlocks * kThreads;
  DeviceArray<typename Kind::Word> words(kSteps * n);
  DeviceArray<uint32_t> out(kSteps * n);
  gpu::fill(words.get(), Kind::kEmpty, words.bytes(), nullptr);
  gpu::launch_cooperative(1, handing_kernel<Kind>, kBlocks, kThreads, 0, nullptr, words.get(),
                          out.get(), kSteps);
  return differences(out.host(), [](size_t i) -> uint32_t {
    return Kind::expected((i + kThreads) % n, i / n + 1);
  });
}

constexpr int kBarrierThreads = 64;

// Every step: each block writes 16 bytes with the step, meets the others of its team, reads those
// of all of them. A team is gridDim.x / teams blocks. counters [teams], zero; cells [steps,
// blocks]; out [steps, blocks]: the sums of what was read.
__global__ static void grid_barrier_kernel(uint32_t* counters, uint4* cells, uint32_t* out,
                                           int teams, int steps) {
  const int size = gridDim.x / teams, team = blockIdx.x / size;
  gpu::GridBarrier barrier(&counters[team], size);
  for (int step = 0; step < steps; ++step) {
    uint4* const row = &cells[step * gridDim.x];
    // Not by the thread that leads: the barrier must carry what the whole block wrote.
    if (threadIdx.x == kBarrierThreads - 1)
      row[blockIdx.x] = make_uint4(blockIdx.x, step, blockIdx.x * step, 1);
    if (step % 2 == 0) {
      barrier.sync();
    } else {
      barrier.arrive();
      barrier.wait();
    }
    if (threadIdx.x == 1) {
      uint32_t sum = 0;
      for (int b = team * size; b < (team + 1) * size; ++b) {
        const uint4 cell = gpu::load_relaxed(&row[b]);
        sum += cell.x + 10 * cell.y + 100 * cell.z + 10000 * cell.w;
      }
      out[step * gridDim.x + blockIdx.x] = sum;
    }
  }
}

template <int teams>
std::string check_grid_barrier() {
  constexpr int kBlocks = 4, kSteps = 6;
  DeviceArray<uint32_t> counters(teams), out(kSteps * kBlocks);
  DeviceArray<uint4> cells(kSteps * kBlocks);
  gpu::fill(counters.get(), 0, counters.bytes(), nullptr);
  gpu::launch_cooperative(1, grid_barrier_kernel, kBlocks, kBarrierThreads, 0, nullptr,
                          counters.get(), cells.get(), out.get(), teams, kSteps);
  return differences(out.host(), [](size_t i) -> uint32_t {
    constexpr int kSize = kBlocks / teams;
    const int step = i / kBlocks, first = i % kBlocks / kSize * kSize;
    uint32_t sum = 0;
    for (int b = first; b < first + kSize; ++b) sum += b + 10 * step + 100 * b * step + 10000;
    return sum;
  });
}

// ---------------------------------------------------------------------------------------------
// Inside a cluster
// ---------------------------------------------------------------------------------------------

constexpr int kClusterThreads = 64, kClusters = 2, kClusterSteps = 6;

// Every step each block stores 16 bytes into the shared memory of the next one, and all meet. out
// [steps, blocks]: the sums of what was found.
__global__ static void cluster_barrier_kernel(uint32_t* out, int steps) {
  RNN_FUSED_SHARED(uint4, inbox, [2]);
  const uint32_t rank = gpu::cluster_rank(), size = gpu::cluster_size();
  gpu::cluster_arrive();
  gpu::cluster_wait();
  for (int step = 0; step < steps; ++step) {
    uint4* const box = &inbox[step % 2];
    if (threadIdx.x == kClusterThreads - 1)
      gpu::store_shared(gpu::shared_of(box, (rank + 1) % size),
                        make_uint4(rank, size, blockIdx.x, step));
    gpu::cluster_arrive();
    gpu::cluster_wait();
    if (threadIdx.x == 1)
      out[step * gridDim.x + blockIdx.x] =
          box->x + 100 * box->y + 10'000 * box->z + 1'000'000 * box->w;
  }
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

// cooperative: all clusters are there at once.
template <unsigned size, bool cooperative = false>
std::string check_cluster_barrier() {
  constexpr unsigned kBlocks = kClusters * size;
  DeviceArray<uint32_t> out(kClusterSteps * kBlocks);
  const auto launch = [&](auto... a) {
    cooperative ? gpu::launch_cooperative(size, a...) : gpu::launch_clusters(size, a...);
  };
  launch(cluster_barrier_kernel, dim3(kBlocks), dim3(kClusterThreads), 0, nullptr, out.get(),
         kClusterSteps);
  return differences(out.host(), [](size_t i) -> uint32_t {
    const uint32_t block = i % kBlocks, rank = (block + size - 1) % size;
    const uint32_t from = block / size * size + rank;
    return rank + 100 * size + 10'000 * from + 1'000'000 * static_cast<uint32_t>(i / kBlocks);
  });
}

constexpr int kSlice = 24;  // vectors of 16 bytes

__device__ inline uint4 vector_of(uint32_t block, uint32_t v, uint32_t step) {
  return make_uint4(block, v, step, block * v);
}

// How h goes round in a cluster: each step every block sends its slice to all of them, and two
// buffers take turns. out [steps, blocks * threads]: each thread's sum of all slices.
__global__ static void store_async_kernel(uint32_t* out, int steps) {
  RNN_FUSED_DYNAMIC_SHARED(uint4, h);  // [2, size * kSlice]
  RNN_FUSED_SHARED(uint64_t, full, [2]);
  const uint32_t rank = gpu::cluster_rank(), size = gpu::cluster_size();
  const uint32_t all = size * kSlice, bytes = all * sizeof(uint4);
  if (threadIdx.x == 0)
    for (uint64_t* barrier : {&full[0], &full[1]}) {
      gpu::make_barrier(barrier, 1);
      gpu::expect_bytes(barrier, bytes);
    }
  gpu::cluster_arrive();
  gpu::cluster_wait();
  for (int step = 0; step < steps; ++step) {
    uint64_t* const barrier = &full[step % 2];
    uint4* const half = &h[step % 2 * all];
    for (uint32_t i = threadIdx.x; i < all; i += blockDim.x) {
      const uint32_t to = i / kSlice, v = i % kSlice;
      gpu::store_async(gpu::shared_of(&half[rank * kSlice + v], to), vector_of(blockIdx.x, v, step),
                       gpu::shared_of(barrier, to));
    }
    gpu::wait_for_phase(barrier, step / 2 % 2);
    uint32_t sum = 0;
    for (uint32_t i = 0; i < all; ++i) {
      const uint4 v = half[(i + threadIdx.x) % all];
      sum += v.x + 10 * v.y + 100 * v.z + 10'000 * v.w;
    }
    out[(step * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] = sum;
    // Before the block's next slice, which is what lets the others send into this buffer again.
    __syncthreads();
    if (threadIdx.x == 0) gpu::expect_bytes(barrier, bytes);
  }
  gpu::cluster_arrive();
  gpu::cluster_wait();
}

template <unsigned size>
std::string check_store_async() {
  constexpr unsigned kBlocks = kClusters * size;
  DeviceArray<uint32_t> out(kClusterSteps * kBlocks * kClusterThreads);
  gpu::launch_clusters(size, store_async_kernel, kBlocks, kClusterThreads,
                       2 * size * kSlice * sizeof(uint4), nullptr, out.get(), kClusterSteps);
  return differences(out.host(), [](size_t i) -> uint32_t {
    const uint32_t step = i / kClusterThreads / kBlocks, block = i / kClusterThreads % kBlocks;
    const uint32_t first = block / size * size;
    uint32_t sum = 0;
    for (uint32_t b = first; b < first + size; ++b)
      for (uint32_t v = 0; v < kSlice; ++v) sum += b + 10 * v + 100 * step + 10'000 * b * v;
    return sum;
  });
}

inline constexpr Case kCases[] = {
    {"mma_m16n8k16 bf16", check_mma<__nv_bfloat16>},
    {"mma_m16n8k16 f16", check_mma<__half>},
    {"mma_m16n8k8_tf32", check_mma_tf32},
    {"to_tf32", check_to_tf32},
    {"ldmatrix", check_ldmatrix},
    {"ldmatrix and mma, bf16", check_ldmatrix_mma<__nv_bfloat16>},
    {"ldmatrix and mma, f16", check_ldmatrix_mma<__half>},
    {"cp_async<4>", check_cp_async<4>},
    {"cp_async<8>", check_cp_async<8>},
    {"cp_async<16>", check_cp_async<16>},
    {"shuffles and votes", check_warp},
    {"large dynamic shared memory", check_large_shared},
    {"load_acquire, store_release", check_acquire_release},
    {"a word with its flag", check_handing<Flagged>},
    {"words that are blank until they are written", check_handing<Blank>},
    {"GridBarrier", check_grid_barrier<1>},
    {"GridBarrier of a part of the grid", check_grid_barrier<2>},
    {"cluster barrier, store_shared", check_cluster_barrier<2>, 90},
    {"the same in clusters of 8", check_cluster_barrier<8>, 90},
    {"the same in a cooperative launch", check_cluster_barrier<4, true>, 90},
    {"the same in clusters of 3", check_cluster_barrier<3, true>, 90},
    {"store_async, mbarrier", check_store_async<2>, 90},
    {"the same in clusters of 8", check_store_async<8>, 90},
};

}  // namespace rnn_fused::primitive_tests
