// SPDX-License-Identifier: Apache-2.0
// The tensor cores, one warp at a time: D += A B with float32 sums. Each wrapper has two bodies: PTX, and the emulation
// of tests/simt. All 32 lanes must call together.
//
// Where an element lives (PTX ISA, "Matrix fragments"), with g = lane / 4, t = lane % 4:
//
//   D [16, 8]    d[0..3]: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
//   16 bit: A [16, 16], B [16, 8], two elements a register, the lower column (of B: row) in the lower half
//     a[0..3]: (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8)         b[0..1]: (2t, g) (2t+8, g)
//   tf32: A [16, 8], B [8, 8], one element a register
//     a[0..3]: (g, t) (g+8, t) (g, t+4) (g+8, t+4)             b[0..1]: (t, g) (t+4, g)
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/half.h"

namespace llmkern::cuda {

// m16n8k16; T is bfloat16 or float16, the type of the elements of A and B.
template <class T>
__device__ inline void matrix_multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
#ifdef LLMKERN_SIMT
  simt::matrix_multiply(d, a, b, std::is_same_v<T, bfloat16> ? simt::Element::kBfloat16 : simt::Element::kFloat16);
#else
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// m16n8k8 over tf32: the registers hold floats already rounded by round_to_tf32.
__device__ inline void matrix_multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef LLMKERN_SIMT
  simt::matrix_multiply(d, a, b, simt::Element::kTf32);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// A float with 10 bits of mantissa, rounded to nearest, ties away from zero, as the bits a register holds.
__device__ inline uint32_t round_to_tf32(float x) {
#ifdef LLMKERN_SIMT
  const uint32_t bits = float_to_bits(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// Loads four 8x8 matrices of 16-bit elements: lane 8m + r holds the (16-byte aligned, shared) address of row r of
// matrix m; x[m] gets elements (g, 2t) and (g, 2t+1) of matrix m, or of its transpose.
template <bool kTransposed = false>
__device__ inline void load_matrices(uint32_t (&x)[4], const void* row) {
#ifdef LLMKERN_SIMT
  simt::load_matrices(x, row, kTransposed);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

}  // namespace llmkern::cuda
