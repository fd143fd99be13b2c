// Element types of tensors and their conversion to and from float, in a form that compilers vectorise.
#pragma once
#include <cstring>

#include "deform_attn_cpu.h"

namespace mpformer {
namespace {  // compiled once per instruction set: must not be merged by the linker

#define INLINE inline __attribute__((always_inline))

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

INLINE float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
INLINE uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(Bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }
INLINE float to_float(Half x) {
  // A multiplication rebases the exponent, of subnormals too; inf and NaN get an exponent of all ones.
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t bits = as_bits(as_float(magnitude) * as_float(0x77800000u));  // * 2^112
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return as_float(bits | uint32_t(x.bits & 0x8000) << 16);
}

INLINE void from_float(float x, float& out) { out = x; }
INLINE void from_float(float x, Bfloat16& out) {  // round to nearest even; NaN stays NaN
  uint32_t bits = as_bits(x);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
INLINE void from_float(float x, Half& out) {
  uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal range: rebase the exponent and round the 13 lost bits to nearest even (may carry into inf, as it
  // should).
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  // Subnormal range: adding 0.5 aligns the half's last place with the float's, so the addition does the
  // rounding.
  uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  out.bits = uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : result));
}

template <class T>
INLINE T* address(const Array& a, int64_t b, int64_t row, int64_t h) {
  return static_cast<T*>(a.data) + b * a.batch_stride + row * a.row_stride + h * a.head_stride;
}

// The rows of one head lie far apart in memory: the processor does not foresee the next ones by itself.
template <class T>
INLINE void prefetch(const T* from, int64_t count) {
  const char* line = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i <= count * int64_t(sizeof(T)); i += 64) __builtin_prefetch(line + i);
}

}  // namespace
}  // namespace mpformer
