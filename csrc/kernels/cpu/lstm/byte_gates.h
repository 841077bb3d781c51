// SPDX-License-Identifier: Apache-2.0
// Gates from weights of 8 bits, on machines with AVX-512 VNNI: the instruction multiplies four unsigned bytes by four
// signed ones in every lane and adds the products.
//
// Activations keep 16 bits: x = scale * q, q in [-32767, 32767], scale the largest magnitude of the row over 32767.
// With q + 2^15 = 256 * high + low the two halves are unsigned bytes, and
//
//   sum w q = 256 (sum w high - 128 sum w) + sum w low
//
// is two products of bytes. Their sums are integers, so no order of summation matters.
#pragma once

#include "kernels/cpu/lstm/panels.h"

namespace llmkern::cpu::LLMKERN_ISA {

#ifdef __AVX512F__
namespace {

struct Bytes {
  using Storage = float;
  using Sum = float;
  using Word = int32_t;  // four weights, or four halves of activations
  using Handed = float;  // h: its scale is known when all of it is there
  using Projection = Wide<float>;
  static constexpr int kTerms = 4;
  // Beyond, a sum of products might not fit into 32 bits.
  static constexpr int64_t kMostTerms = 1 << 16;
};

// Named to the assembler for the reasons that Bf16Pairs gives, and behind has_vnni().
inline IntVec multiply_add_bytes(IntVec unsigned_bytes, IntVec signed_bytes, IntVec sum) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
}

// A row of a tile: its scale, then the high halves, then the low ones, both rounded up to vectors.
struct ByteRow {
  static constexpr int64_t kHeader = 4;  // words: what follows is aligned for a quarter of a vector

  static int64_t half(int64_t K) { return round_up(K, kLanes<float>) / Bytes::kTerms; }
  static int64_t size(int64_t K) { return kHeader + 2 * half(K); }

  static void fill(const float* from, int64_t K, int32_t* to) {
    typedef uint8_t ByteVec __attribute__((vector_size(kLanes<float>)));
    const float largest = finite_maximum(from, K);
    const float scale = largest < 1e-30f ? 0 : largest / 32767, inverse = scale > 0 ? 1 / scale : 0;
    memcpy(to, &scale, sizeof scale);
    int32_t *high = to + kHeader, *low = high + half(K);
    for_lanes<float>(0, K, [&](int64_t k, int64_t n) {
      const FloatVec q = load(from + k, n) * inverse + 12582912.0f;  // 1.5 * 2^23: the sum rounds, into the low bits
      const IntVec halves = bits_of(q) - 0x4b400000 + 32768;
      const ByteVec upper = __builtin_convertvector(halves >> 8, ByteVec);
      const ByteVec lower = __builtin_convertvector(halves & 255, ByteVec);
      memcpy(high + k / Bytes::kTerms, &upper, sizeof upper);
      memcpy(low + k / Bytes::kTerms, &lower, sizeof lower);
    });
  }
};

// c[rows, kGatesWidth] of some rows of tiles  (+ c).
template <int rows>
void multiply_bytes(int64_t K, const int32_t* tiles, const int32_t* panel, float* c, bool accumulate) {
  constexpr int lanes = kLanes<float>;
  const int64_t words = words_of<Bytes>(K), half = ByteRow::half(K), size = ByteRow::size(K);
  const int32_t* activations = tiles + ByteRow::kHeader;
  const int32_t *offsets = panel, *scales = panel + kGatesWidth<float>;
  IntVec high[rows][4], low[rows][4] = {};
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < 4; ++j) high[i][j] = load(offsets + j * lanes);
  }
  panel += 2 * kGatesWidth<float>;
  for (int64_t k = 0; k < words; ++k, panel += kGatesWidth<float>) {
    IntVec b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = load(panel + j * lanes);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const IntVec upper = broadcast(activations[i * size + k]), lower = broadcast(activations[i * size + half + k]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        high[i][j] = multiply_add_bytes(upper, b[j], high[i][j]);
        low[i][j] = multiply_add_bytes(lower, b[j], low[i][j]);
      }
    }
  }
  for (int i = 0; i < rows; ++i, tiles += size) {
    float scale;
    memcpy(&scale, tiles, sizeof scale);
    for (int j = 0; j < 4; ++j, c += lanes) {
      const FloatVec sum =
          __builtin_convertvector(high[i][j], FloatVec) * 256.0f + __builtin_convertvector(low[i][j], FloatVec);
      const FloatVec value = sum * (float_of(load(scales + j * lanes)) * scale);
      store(c, accumulate ? load(c) + value : value);
    }
  }
}

template <>
struct Gates<Bytes> {
  static constexpr int64_t kRows = 3;  // 8 accumulators each

  static int64_t tile_words(int64_t M, int64_t K) { return M * ByteRow::size(K); }
  // -128 times the sum of a row's weights, the row's scale, and the weights.
  static int64_t panel_words(int64_t K) { return (2 + words_of<Bytes>(K)) * kGatesWidth<float>; }

  static void fill(const float* from, int64_t row, int64_t, int64_t K, int32_t* tiles) {
    ByteRow::fill(from, K, tiles + row * ByteRow::size(K));
  }
  static void hand_over(const float* from, int64_t count, int64_t row, int64_t k, int64_t, int64_t K, float* handed) {
    memcpy(handed + row * K + k, from, static_cast<size_t>(count) * sizeof(float));
  }
  static void hand_over_tile(const float* rows, int64_t width, int64_t first, int64_t count, int64_t k, int64_t M,
                             int64_t K, float* handed) {
    for (int64_t i = 0; i < count; ++i) hand_over(rows + i * kUnits<float>, width, first + i, k, M, K, handed);
  }
  // Every worker makes its own: that takes less than another barrier.
  static Scratch<int32_t> tiles(const float* handed, int64_t M, int64_t K) {
    auto own = scratch<int32_t>(Slot::kLstmByteTiles, tile_words(M, K));
    for (int64_t row = 0; row < M; ++row) fill(handed + row * K, row, M, K, own);
    return own;
  }

  // 8 bits are a copy that somebody asked for: such panels are always packed.
  static void multiply(int64_t M, int64_t, int64_t K, const int32_t* tiles, const GatePanel<Bytes>& of, int64_t,
                       float* c, bool accumulate) {
    const int64_t size = ByteRow::size(K);
    const int32_t* const panel = of.packed;
    for (; M >= kRows; M -= kRows, tiles += kRows * size, c += kRows * kGatesWidth<float>) {
      multiply_bytes<kRows>(K, tiles, panel, c, accumulate);
    }
    if (M == 2) multiply_bytes<2>(K, tiles, panel, c, accumulate);
    if (M == 1) multiply_bytes<1>(K, tiles, panel, c, accumulate);
  }

  static void pack(const GatePanel<Bytes>& from, int64_t K, int64_t units, bool, int32_t* panel) {
    const int64_t words = words_of<Bytes>(K);
    memset(panel, 0, static_cast<size_t>(panel_words(K)) * sizeof(int32_t));
    const Buffer<int8_t> row(words * Bytes::kTerms);
    memset(row.data(), 0, static_cast<size_t>(words * Bytes::kTerms));
    for (int64_t gate = 0; gate < 4; ++gate) {
      for (int64_t unit = 0; unit < units; ++unit) {
        int32_t* to = panel + gate * kUnits<float> + unit;
        const float scale = quantise_weights(from.weight + gate * from.gate_stride + unit * K, K, row.data());
        memcpy(to + kGatesWidth<float>, &scale, sizeof scale);
        for (int64_t k = 0; k < K; ++k) to[0] -= 128 * row[k];
        for (int64_t k = 0; k < words; ++k) {
          memcpy(to + (2 + k) * kGatesWidth<float>, row.data() + k * Bytes::kTerms, sizeof(int32_t));
        }
      }
    }
  }
};

}  // namespace
#endif

}  // namespace llmkern::cpu::LLMKERN_ISA
