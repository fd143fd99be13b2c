// The element types of tensors that the CUDA kernels read and write: 0 float, 1 bfloat16, 2 half.
#pragma once

template <int TYPE>
struct ElementOf;
struct Bfloat16 {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};
template <>
struct ElementOf<0> {
  typedef float type;
};
template <>
struct ElementOf<1> {
  typedef Bfloat16 type;
};
template <>
struct ElementOf<2> {
  typedef Half type;
};

#ifndef EMULATED  // tests/ops/cuda_emulation.h defines these for a processor without PTX
__device__ float to_float(Half x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}
__device__ void from_float(float f, Half& x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(f)); }
__device__ void from_float(float f, Bfloat16& x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x.bits) : "f"(f)); }
#endif

__device__ float to_float(float x) { return x; }
__device__ float to_float(Bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ void from_float(float f, float& x) { x = f; }
