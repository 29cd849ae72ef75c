// A small relative of the persistent kernels, with everything that they are made of: weights in
// registers for the whole sequence, h through global memory and cp.async, mma, a grid barrier.
//
// h_t = tanh(W h_{t-1} + x_t), in bfloat16 with sums in float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "csrc/cuda/primitives.cuh"
#include "tests/emulation/device_array.h"

namespace rnn_fused::persistent_tests {

using bf16 = __nv_bfloat16;

constexpr int H = 64, B = 16, T = 6;
constexpr int kUnits = 16;          // of a block: the rows of one mma
constexpr int kWarps = B / 8;       // each has the 8 sequences of one mma
constexpr int kPitch = H + 8;       // of a row of h in shared memory: 16 bytes from bank to bank
constexpr int kChunks = B * H / 8;  // of 16 bytes, in h
constexpr int kKTiles = H / 16;

struct Params {
  const bf16* weight;  // [H, H]
  const float* x;      // [T, B, H]
  bf16* h;             // [T + 1, B, H]; h[0] is given. A fresh address every step: no stale L1
  uint32_t* counter;   // [1], zero
};

// The first half of the columns of h, or the second, as one group of copies.
__device__ inline void copy_half(bf16* rows, const bf16* h, int half) {
  for (int i = threadIdx.x; i < kChunks / 2; i += blockDim.x) {
    const int b = i / (H / 16), k = i % (H / 16) * 8 + half * (H / 2);
    gpu::cp_async<16>(&rows[b * kPitch + k], &h[b * H + k]);
  }
  gpu::cp_async_commit();
}

__global__ static void __launch_bounds__(32 * kWarps) persistent_kernel(Params p) {
  RNN_FUSED_DYNAMIC_SHARED(bf16, rows);  // [B, kPitch]
  RNN_FUSED_SHARED(bf16, weights, [kUnits][kPitch]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t4 = lane % 4;
  const int first = blockIdx.x * kUnits;

  for (int i = threadIdx.x; i < kUnits * H; i += blockDim.x)
    weights[i / H][i % H] = p.weight[first * H + i];
  __syncthreads();
  uint32_t a[kKTiles][4];
  for (int k = 0; k < kKTiles; ++k)
    gpu::ldmatrix_x4(a[k], &weights[lane % 16][k * 16 + lane / 16 * 8]);

  gpu::GridBarrier barrier(p.counter);
  for (int t = 0; t < T; ++t) {
    copy_half(rows, &p.h[t * B * H], 0);
    copy_half(rows, &p.h[t * B * H], 1);
    float d[4];
    for (int i = 0; i < 4; ++i) {
      const int unit = first + g + 8 * (i / 2), b = 8 * warp + 2 * t4 + i % 2;
      d[i] = p.x[(t * B + b) * H + unit];
    }
    for (int k = 0; k < kKTiles; ++k) {
      if (k == 0) gpu::cp_async_wait<1>();
      if (k == kKTiles / 2) gpu::cp_async_wait<0>();
      if (k % (kKTiles / 2) == 0) __syncthreads();
      uint32_t b[2];
      gpu::ldmatrix_x2(b, &rows[(8 * warp + lane % 8) * kPitch + k * 16 + lane / 8 % 2 * 8]);
      gpu::mma_m16n8k16<bf16>(d, a[k], b);
    }
    for (int i = 0; i < 4; ++i) {
      const int unit = first + g + 8 * (i / 2), b = 8 * warp + 2 * t4 + i % 2;
      const bf16 h = __float2bfloat16(tanhf(d[i]));
      p.h[((t + 1) * B + b) * H + unit] = h;
    }
    barrier.sync();
  }
}

inline float pattern(int i) { return static_cast<float>((i * 37 + i / 11 * 5) % 101) / 50 - 1; }

inline std::string check_persistent() {
  std::vector<bf16> weight(H * H), h((T + 1) * B * H);
  std::vector<float> x(T * B * H);
  for (int i = 0; i < H * H; ++i) weight[i] = __float2bfloat16(pattern(i) / 8);
  for (int i = 0; i < T * B * H; ++i) x[i] = pattern(i + 7);
  for (int i = 0; i < B * H; ++i) h[i] = __float2bfloat16(pattern(i + 19));
  std::fill(h.begin() + B * H, h.end(), __float2bfloat16(NAN));

  DeviceArray<bf16> device_weight(weight), device_h(h);
  DeviceArray<float> device_x(x);
  DeviceArray<uint32_t> counter(1);
  gpu::fill(counter.get(), 0, counter.bytes(), nullptr);
  gpu::launch_cooperative(
      1, persistent_kernel, H / kUnits, 32 * kWarps, sizeof(bf16) * B * kPitch, nullptr,
      Params{device_weight.get(), device_x.get(), device_h.get(), counter.get()});
  const std::vector<bf16> got = device_h.host();

  double error = 0;
  for (int t = 0; t < T; ++t)
    for (int b = 0; b < B; ++b)
      for (int unit = 0; unit < H; ++unit) {
        double sum = x[(t * B + b) * H + unit];
        for (int k = 0; k < H; ++k)
          sum += double(__bfloat162float(weight[unit * H + k])) *
                 __bfloat162float(got[(t * B + b) * H + k]);
        const double h_t = __bfloat162float(got[((t + 1) * B + b) * H + unit]);
        error = std::isnan(h_t) ? INFINITY : std::max(error, std::abs(std::tanh(sum) - h_t));
      }
  // From the kernel's own h_{t-1}: what remains is the rounding of h_t, and a little of the sum.
  return error < 0x1.1p-9 ? "" : "the largest error is " + std::to_string(error);
}

}  // namespace rnn_fused::persistent_tests
