// Runs a CUDA kernel on a CPU, for tests of its arithmetic and indexing: the 32 lanes of a warp are fibers that run
// in turn from one shuffle to the next, warps and blocks one after the other. Nothing here tests races, the memory
// model or what the GPU's compiler makes of the source.
#pragma once
#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#define EMULATED 1
#define HAS_VECTOR_ADD 1
#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(n)
using std::max;

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
static Index blockIdx, blockDim;
template <class T> T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) __builtin_trap();  // a GPU would fault too
  return *p;
}
static float __uint_as_float(unsigned bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

namespace emulation {

struct Warp {
  ucontext_t scheduler, lane[32];
  bool done[32];
  uint32_t exchanged[2][32];  // two rounds, as the first lane may be one shuffle ahead of the last
  int round[32];
  int current;
};
static Warp warp;
static unsigned first_thread;

inline uint32_t exchange(uint32_t mine, int from) {
  const int lane = warp.current, round = warp.round[lane]++ & 1;
  warp.exchanged[round][lane] = mine;
  swapcontext(&warp.lane[lane], &warp.scheduler);
  return warp.exchanged[round][from];
}

template <class T> T shuffle(T x, int from) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = exchange(bits, from);
  memcpy(&x, &bits, 4);
  return x;
}

template <class Body> void run_warp(Body& body) {
  static std::vector<char> stacks(32 * (1 << 16));
  static Body* running;
  running = &body;
  for (int i = 0; i < 32; i++) {
    getcontext(&warp.lane[i]);
    warp.lane[i].uc_stack.ss_sp = stacks.data() + i * (1 << 16);
    warp.lane[i].uc_stack.ss_size = 1 << 16;
    warp.lane[i].uc_link = &warp.scheduler;
    warp.done[i] = false;
    warp.round[i] = 0;
    makecontext(&warp.lane[i], (void (*)())(+[] {
                  (*running)();
                  warp.done[warp.current] = true;
                }),
                0);
  }
  for (bool any = true; any;) {
    any = false;
    for (int i = 0; i < 32; i++) {
      if (warp.done[i]) continue;
      warp.current = i;
      swapcontext(&warp.scheduler, &warp.lane[i]);
      any = any || !warp.done[i];
    }
    for (int i = 1; i < 32; i++)  // on a GPU a shuffle that some lanes do not reach is undefined
      if (any && (warp.done[i] != warp.done[0] || warp.round[i] != warp.round[0])) __builtin_trap();
  }
}

template <class... A, size_t... I>
void launch(void (*kernel)(A...), int blocks, int threads, void** arguments, std::index_sequence<I...>) {
  blockDim.x = threads;
  for (int block = 0; block < blocks; block++) {
    for (first_thread = 0; first_thread < unsigned(threads); first_thread += 32) {
      blockIdx.x = block;
      auto body = [&] { kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...); };
      run_warp(body);
    }
  }
}

template <class... A> void launch(void (*kernel)(A...), int blocks, int threads, void** arguments) {
  launch(kernel, blocks, threads, arguments, std::index_sequence_for<A...>());
}

}  // namespace emulation

struct ThreadIndex {
  struct X {
    operator unsigned() const { return emulation::first_thread + emulation::warp.current; }
  } x;
};
static ThreadIndex threadIdx;

template <class T> T __shfl_sync(unsigned, T x, int lane, int width) {
  return emulation::shuffle(x, emulation::warp.current / width * width + lane);
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask, int) {
  return emulation::shuffle(x, emulation::warp.current ^ mask);
}

// What the source leaves to PTX.
struct Bfloat16;
struct Half;
float to_float(Half x);
void from_float(float f, Half& x);
void from_float(float f, Bfloat16& x);
template <int N> void add(float* to, const float* x) {
  if (reinterpret_cast<uintptr_t>(to) % (4 * N) != 0) __builtin_trap();
  for (int i = 0; i < N; i++) to[i] += x[i];
}
