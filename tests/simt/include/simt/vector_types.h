// SPDX-License-Identifier: Apache-2.0
// CUDA's small vectors.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define SIMT_VECTORS(T, name, alignment)                     \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(alignment) name##4 { T x, y, z, w; };       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
// clang-format off
SIMT_VECTORS(float, float, 16)
SIMT_VECTORS(double, double, 16)
SIMT_VECTORS(int, int, 16)
SIMT_VECTORS(unsigned, uint, 16)
SIMT_VECTORS(unsigned short, ushort, 8)
// clang-format on
#undef SIMT_VECTORS
