// float32 as two bfloat16 terms, x = high + low: a product of two numbers is then that of all four
// terms, in tile registers, and off by no more than 2^-16 of it.
//
// The right factor is one word a number, (high, low): as large as the float. The left one is two
// words, (high, high) and (low, low), so that the pairs that an instruction adds up are high * high
// + high * low and low * high + low * low.
#pragma once

#include "csrc/cpu/simd.h"

namespace rnn_fused::RNN_FUSED_ISA {

// float32 in memory; in a panel, the right word.
struct split32 {
  uint32_t bits;
};

// The left words of 16 numbers are 16 of the first kind, then 16 of the second: so nobody can take
// one number by itself.
struct SplitTerms {
  uint64_t words;
};

inline Vec<float> load(const split32* p) { return load_as<Vec<float>>(p); }
inline void store(split32* p, Vec<float> v) { store_as(p, v); }

inline U32 right_words(Vec<float> x) {
  const Vec<float> high = round_to<bf16>(x), rest = x - high;
  // Infinity has no rest, and neither has what rounds to it.
  const Vec<float> low = round_to<bf16>(high - high == Vec<float>{} ? rest : Vec<float>{});
  return bit_cast<U32>(high) | (bit_cast<U32>(low) >> 16);
}

inline void store_left(SplitTerms* p, U32 right) {
  store_as(p, (right & 0xffff0000) | (right >> 16));
  store_as(p + kLanes<float> / 2, (right << 16) | (right & 0xffff));
}

inline void store(SplitTerms* p, Vec<float> v) { store_left(p, right_words(v)); }
// The others of the 16 are zero.
inline void store(SplitTerms* p, Vec<float> v, int n) {
  float lanes[kLanes<float>] = {};
  store(lanes, v);
  store(p, load(lanes, n));
}

}  // namespace rnn_fused::RNN_FUSED_ISA
