// SPDX-License-Identifier: Apache-2.0
// Tensor-core instructions by their definition. Products and sums are exact in float64 and rounded once; the hardware
// rounds differently in the last bits, so compare with a tolerance.
#include <cstring>

#include "kernels/half.h"
#include "warp.h"

namespace simt {

namespace {

constexpr Site kHere = {};

struct Multiply {
  float* d;
  const uint32_t *a, *b;
  Element element;
};

double element_of(uint32_t word, int half, Element element) {
  const auto bits = static_cast<uint16_t>(word >> 16 * half);
  switch (element) {
    case Element::kBfloat16:
      return llmkern::widen(llmkern::bfloat16{bits});
    case Element::kFloat16:
      return llmkern::widen(llmkern::float16{bits});
    case Element::kTf32:
      break;
  }
  return llmkern::bits_to_float(word & 0xffffe000u);  // the hardware ignores the low bits
}

// Elements of A and B as matrices; matrix.cuh has the layout.
void multiply(Thread* const* lanes) {
  const auto operand = [&](int lane) -> const Multiply& { return *static_cast<const Multiply*>(lanes[lane]->operand); };
  const Element element = operand(0).element;
  const int per_word = element == Element::kTf32 ? 1 : 2, K = 8 * per_word;
  double A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < per_word; ++half) {
      for (int i = 0; i < 4; ++i) {
        A[g + i % 2 * 8][per_word * t + i / 2 * (K / 2) + half] = element_of(operand(lane).a[i], half, element);
      }
      for (int i = 0; i < 2; ++i) {
        B[per_word * t + i * (K / 2) + half][g] = element_of(operand(lane).b[i], half, element);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = operand(lane).d[i];
      for (int k = 0; k < K; ++k) sum += A[row][k] * B[k][column];
      operand(lane).d[i] = static_cast<float>(sum);
    }
  }
}

struct Load {
  uint32_t* x;
  const void* row;
  bool transposed;
};

void load(Thread* const* lanes) {
  const auto operand = [&](int lane) -> const Load& { return *static_cast<const Load*>(lanes[lane]->operand); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(elements[row], operand(8 * matrix + row).row, sizeof elements[row]);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const bool transposed = operand(lane).transposed;
      const uint16_t low = transposed ? elements[2 * t][g] : elements[g][2 * t];
      const uint16_t high = transposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
      operand(lane).x[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace

void matrix_multiply(float* d, const uint32_t* a, const uint32_t* b, Element element) {
  Multiply operand{d, a, b, element};
  collective("matrix_multiply", 0xffffffffu, &operand, multiply, kHere);
}

void load_matrices(uint32_t* x, const void* row, bool transposed) {
  const void* pc = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fault("misaligned access", "a matrix row must be aligned to 16 bytes", pc);
  touch(row, 16, Access::kRead, pc);
  Load operand{x, row, transposed};
  collective("load_matrices", 0xffffffffu, &operand, load, kHere);
}

}  // namespace simt
