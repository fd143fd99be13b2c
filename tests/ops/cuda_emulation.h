// Runs a CUDA kernel on a CPU, for tests of its arithmetic and indexing: the threads of a block are fibers. Those of
// a warp run in turn from one shuffle to the next, warps one after the other from one barrier to the next, blocks
// one after the other. Every second launch goes through them in the opposite order, so that results show a missing
// barrier. Nothing else here tests races, the memory model or what the GPU's compiler makes of the source.
#pragma once
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#define EMULATED 1
#define HAS_VECTOR_ADD 1
#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(n)
#define __shared__ static  // as blocks run one after the other
using std::max;
using std::min;

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
static uint4* dynamic;  // shared memory that the launch asks for
template <class T> T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) __builtin_trap();  // a GPU would fault too
  return *p;
}
static float __uint_as_float(unsigned bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static unsigned __float_as_uint(float f) {
  unsigned bits;
  memcpy(&bits, &f, 4);
  return bits;
}
static float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

namespace emulation {

constexpr int kStack = 1 << 16, kThreads = 1024;
enum Waits { kForWarp, kForBlock, kForNothing };
struct Thread {
  ucontext_t context;
  Waits waits;
  int rounds;  // shuffles so far
};
static Thread thread[kThreads];
static ucontext_t scheduler;
static uint32_t exchanged[2][kThreads];  // two rounds, as the first lane may be one shuffle ahead of the last
static int current;
static bool backwards = true;
static std::function<void()> body;

inline void wait(Waits waits) {
  thread[current].waits = waits;
  swapcontext(&thread[current].context, &scheduler);
}

template <class T> T shuffle(T x, int from) {
  static_assert(sizeof(T) == 4, "a word");
  const int warp = current / 32 * 32, round = thread[current].rounds++ & 1;
  memcpy(&exchanged[round][current], &x, 4);
  wait(kForWarp);
  memcpy(&x, &exchanged[round][warp + from], 4);
  return x;
}

// Runs threads [first, first + count) once each and returns what all of them wait for then. On a GPU a shuffle or
// a barrier that some do not reach is undefined.
inline Waits run(int first, int count) {
  for (int i = 0; i < count; i++) {
    current = first + (backwards ? count - 1 - i : i);
    if (thread[current].waits != kForNothing) swapcontext(&scheduler, &thread[current].context);
  }
  for (int i = first; i < first + count; i++)
    if (thread[i].waits != thread[first].waits || thread[i].rounds != thread[first].rounds) __builtin_trap();
  return thread[first].waits;
}

inline void run_block(int threads) {
  static std::vector<char> stacks(size_t(kThreads) * kStack);
  if (threads > kThreads || threads % 32 != 0) __builtin_trap();
  for (int i = 0; i < threads; i++) {
    Thread& t = thread[i];
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks.data() + size_t(i) * kStack;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = &scheduler;
    t.waits = kForBlock;
    t.rounds = 0;
    makecontext(&t.context, (void (*)())(+[] {
                  body();
                  thread[current].waits = kForNothing;
                }),
                0);
  }
  for (bool done = false; !done;) {
    for (int i = 0; i < threads; i += 32) {
      const int warp = backwards ? threads - 32 - i : i;
      while (run(warp, 32) == kForWarp) {
      }
    }
    done = thread[0].waits == kForNothing;
    for (int warp = 0; warp < threads; warp += 32)  // a barrier that other warps have not reached
      if ((thread[warp].waits == kForNothing) != done) __builtin_trap();
  }
}

// Shared memory whose end is that of a page, so that going past it is noticed.
class Shared {
 public:
  explicit Shared(size_t bytes) : bytes_((bytes + 15) / 16 * 16), pages_((bytes_ + kPage - 1) / kPage * kPage) {
    void* mapped = mmap(nullptr, pages_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    base_ = static_cast<char*>(mapped);
    if (mapped == MAP_FAILED || mprotect(base_ + pages_, kPage, PROT_NONE) != 0) __builtin_trap();
  }
  ~Shared() { munmap(base_, pages_ + kPage); }
  char* start() const { return base_ + pages_ - bytes_; }
  void fill_with_anything() const { memset(start(), 0xa5, bytes_); }

 private:
  static constexpr size_t kPage = 1 << 16;
  size_t bytes_, pages_;
  char* base_;
};

template <class... A, size_t... I>
void launch(void (*kernel)(A...), int blocks, int threads, int shared, void** arguments,
            std::index_sequence<I...>) {
  const Shared memory(shared);
  dynamic = reinterpret_cast<uint4*>(memory.start());
  blockDim.x = threads;
  backwards = !backwards;
  body = [&] { kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...); };
  for (int block = 0; block < blocks; block++) {
    blockIdx.x = backwards ? blocks - 1 - block : block;
    memory.fill_with_anything();
    run_block(threads);
  }
}

template <class... A>
void launch(void (*kernel)(A...), int blocks, int threads, int shared, void** arguments) {
  launch(kernel, blocks, threads, shared, arguments, std::index_sequence_for<A...>());
}

}  // namespace emulation

struct ThreadIndex {
  struct X {
    operator unsigned() const { return emulation::current; }
  } x;
};
static ThreadIndex threadIdx;

template <class T> T __shfl_sync(unsigned, T x, int lane, int width) {
  return emulation::shuffle(x, emulation::current % 32 / width * width + lane);
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask, int) {
  return emulation::shuffle(x, emulation::current % 32 ^ mask);
}
template <class T> T __shfl_up_sync(unsigned, T x, int steps, int) {
  const int lane = emulation::current % 32;
  return emulation::shuffle(x, lane < steps ? lane : lane - steps);
}
static unsigned __ballot_sync(unsigned, bool mine) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; lane++) {
    const int at = (emulation::current + lane) % 32;
    bits |= unsigned(emulation::shuffle(int(mine), at)) << at;
  }
  return bits;
}
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static void __syncwarp() { emulation::shuffle(0, 0); }
static void __syncthreads() { emulation::wait(emulation::kForBlock); }
template <class T> T atomicAdd(T* to, T x) {
  const T before = *to;
  *to = T(uint32_t(before) + uint32_t(x));  // an overflow wraps
  return before;
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
