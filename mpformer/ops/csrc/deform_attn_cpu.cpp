// Multi-scale deformable attention on the CPU: choice of the kernel, memory, threads and the order of the
// tasks.
//
// Tasks are numbered; threads draw the next number and wait, where a task needs the results of earlier ones,
// on a counter. As numbers are drawn in order, whatever a task waits for is already running or done. How the
// work is cut depends on the shapes alone, and no two tasks add to the same number: so the bits do not depend
// on the threads.
#include "deform_attn_cpu.h"

#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "threads.h"

namespace mpformer {
namespace {

const Kernel* const kernels[] = {
    &kernel_plain,
#if defined(__x86_64__)
    &kernel_avx2,
    &kernel_avx512,
#endif
};
constexpr int kKernels = sizeof(kernels) / sizeof(kernels[0]);

bool runs_here(int kernel) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (kernel == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (kernel == 2)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
#endif
  return kernel == 0;
}

// Aligned memory, released with the object; null if there is none left.
template <class T>
class Memory {
 public:
  Memory() : data_(nullptr) {}
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  bool allocate(int64_t count) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, size_t(count > 0 ? count : 1) * sizeof(T)) != 0) return false;
    data_ = static_cast<T*>(data);
    return true;
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

int64_t tile_floats(const Problem& p) { return kTile * ((p.points_per_level * 9 + 2) * p.levels); }

Tile tile_in(float* memory, const Problem& p) {
  const int64_t points = p.levels * p.points_per_level * kTile;
  Tile t;
  auto take = [&memory](int64_t count) {
    float* taken = memory;
    memory += count;
    return taken;
  };
  t.coordinates = take(2 * points);
  t.reference = take(2 * p.levels * kTile);
  t.weights = take(points);
  t.fraction_x = take(points);
  t.fraction_y = take(points);
  for (float*& corner : t.corner) corner = take(points);
  return t;
}

struct Work {
  const Problem* problem;
  const Kernel* kernel;
  const Level* levels;
  int64_t slab_cells;  // of all levels together, or of the largest one
  int64_t padded;      // floats per cell
  int64_t slabs;  // forward: how many exist; slab s serves every (batch, head) with the same s modulo this
  bool by_level;  // backward: how the work is cut
  float* slab_memory;
  float* tile_memory;
  int32_t* cell_memory;
  std::atomic<int64_t>* done;  // counters per (batch, head)
  std::atomic<int64_t> next_task;
  std::atomic<int32_t> next_thread;

  float* slab(int64_t i) const { return slab_memory + i * slab_cells * padded; }
  Tile tile(int thread) const {
    Tile t = tile_in(tile_memory + thread * tile_floats(*problem), *problem);
    t.cell = cell_memory + thread * problem->levels * problem->points_per_level * kTile;
    return t;
  }
};

void wait_for(const std::atomic<int64_t>& counter, int64_t count) {
  while (counter.load(std::memory_order_acquire) < count) sched_yield();
}

constexpr int64_t kQueriesPerTask = 1024;  // a multiple of kTile
constexpr int64_t kCellsPerPack = 4096;    // about this many cells are packed by one task

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t rows_per_pack(const Level& level) { return divide_up(kCellsPerPack, level.pitch); }

// Per (batch, head): pack the slab in parts, then gather in chunks of queries.
void forward_thread(Work& w) {
  const Problem& p = *w.problem;
  const Tile tile = w.tile(w.next_thread.fetch_add(1));
  int64_t packs = 0;
  for (int64_t l = 0; l < p.levels; l++)
    packs += divide_up(w.levels[l].height + 3, rows_per_pack(w.levels[l]));
  const int64_t chunks = divide_up(p.queries, kQueriesPerTask), tasks = packs + chunks;
  for (int64_t task; (task = w.next_task.fetch_add(1)) < p.batch * p.heads * tasks;) {
    const int64_t pair = task / tasks, b = pair / p.heads, h = pair % p.heads;
    float* slab = w.slab(pair % w.slabs);
    int64_t part = task % tasks;
    if (part < packs) {
      if (pair >= w.slabs) wait_for(w.done[pair - w.slabs], tasks);  // the slab is still in use until then
      int64_t l = 0;
      for (int64_t n; part >= (n = divide_up(w.levels[l].height + 3, rows_per_pack(w.levels[l]))); l++)
        part -= n;
      const Level& level = w.levels[l];
      const int64_t row0 = part * rows_per_pack(level), row1 = row0 + rows_per_pack(level);
      w.kernel->pack(p, level, b, h, row0, row1 < level.height + 3 ? row1 : level.height + 3,
                     slab + level.first_cell * w.padded);
    } else {
      const int64_t q0 = (part - packs) * kQueriesPerTask, q1 = q0 + kQueriesPerTask;
      wait_for(w.done[pair], packs);
      w.kernel->forward(p, w.levels, b, h, q0, q1 < p.queries ? q1 : p.queries, slab, tile);
    }
    w.done[pair].fetch_add(1, std::memory_order_release);
  }
}

// One task per (batch, head), or if that keeps the threads busier, one per level with a softmax to follow in
// chunks of queries. Levels share nothing but the softmax, so both ways give the same bits; the first reads
// all but the slabs once instead of once per level.
void backward_thread(Work& w) {
  const Problem& p = *w.problem;
  const int thread = w.next_thread.fetch_add(1);
  const Tile tile = w.tile(thread);
  float *value_slab = w.slab(2 * thread), *grad_slab = w.slab(2 * thread + 1);
  const int64_t pairs = p.batch * p.heads, ranges = w.by_level ? p.levels : 1, range = p.levels / ranges;
  const int64_t chunks = w.by_level && p.reference.data ? divide_up(p.queries, kQueriesPerTask) : 0;
  for (int64_t task; (task = w.next_task.fetch_add(1)) < pairs * (ranges + chunks);) {
    if (task < pairs * ranges) {
      const int64_t pair = task / ranges, b = pair / p.heads, h = pair % p.heads, level0 = task % ranges;
      for (int64_t l = level0; l < level0 + range; l++) {
        const int64_t first = w.levels[l].first_cell - w.levels[level0].first_cell;
        w.kernel->pack(p, w.levels[l], b, h, 0, w.levels[l].height + 3, value_slab + first * w.padded);
      }
      w.kernel->backward(p, w.levels, level0, level0 + range, b, h, value_slab, grad_slab, tile);
      w.done[pair].fetch_add(1, std::memory_order_release);
    } else {
      const int64_t pair = (task - pairs * ranges) / chunks;
      const int64_t q0 = (task - pairs * ranges) % chunks * kQueriesPerTask, q1 = q0 + kQueriesPerTask;
      wait_for(w.done[pair], ranges);
      w.kernel->softmax_backward(p, pair / p.heads, pair % p.heads, q0, q1 < p.queries ? q1 : p.queries,
                                 tile);
    }
  }
}

void forward_entry(void* w) { forward_thread(*static_cast<Work*>(w)); }
void backward_entry(void* w) { backward_thread(*static_cast<Work*>(w)); }

int call(const Problem& p, bool is_backward) {
  int chosen = p.instruction_set;
  if (chosen < 0)
    for (chosen = kKernels - 1; !runs_here(chosen);) chosen--;
  if (chosen >= kKernels || !runs_here(chosen)) return 2;

  Work w;
  w.problem = &p;
  w.kernel = kernels[chosen];
  w.padded = round_up(p.channels, w.kernel->lanes);
  w.next_task = 0;
  w.next_thread = 0;
  const int64_t pairs = p.batch * p.heads;

  Memory<Level> levels;
  if (!levels.allocate(p.levels)) return 1;
  int64_t cells = 0, rows = 0, largest = 0;
  for (int64_t l = 0; l < p.levels; l++) {
    const int32_t height = int32_t(p.shapes[2 * l]), width = int32_t(p.shapes[2 * l + 1]);
    levels[l] = Level{height, width, width + 2, (height + 1) * (width + 2), cells, rows};
    cells += cells_of(levels[l]);
    rows += int64_t(height) * width;
    if (cells_of(levels[l]) > largest) largest = cells_of(levels[l]);
  }
  w.levels = levels.get();

  // Small problems are not worth a thread: one per 2^17 products of the forward pass at most.
  const int64_t products = pairs * p.queries * p.levels * p.points_per_level * p.channels * 4;
  int64_t threads = divide_up(products, 1 << 17);
  if (threads > p.threads) threads = p.threads;
  w.by_level = is_backward && p.levels > 1 && pairs % threads != 0 && pairs < 4 * threads;
  int64_t tasks_at_once = pairs;
  if (!is_backward) tasks_at_once *= divide_up(p.queries, kQueriesPerTask);
  if (w.by_level) tasks_at_once *= p.levels;
  if (threads > tasks_at_once) threads = tasks_at_once;

  Memory<float> slabs, tiles;
  Memory<int32_t> tile_cells;
  Memory<std::atomic<int64_t>> done;
  w.slabs = is_backward ? 2 * threads : pairs < threads + 1 ? pairs : threads + 1;
  w.slab_cells = (w.by_level ? largest : cells) + 1;  // one more cell: the row of the incoming gradient
  const int64_t tile_size = tile_floats(p), cell_size = p.levels * p.points_per_level * kTile;
  if (!slabs.allocate(w.slabs * w.slab_cells * w.padded) || !tiles.allocate(threads * tile_size) ||
      !tile_cells.allocate(threads * cell_size) || !done.allocate(pairs))
    return 1;
  std::memset(tiles.get(), 0, threads * tile_size * sizeof(float));
  for (int64_t i = 0; i < pairs; i++) new (&done[i]) std::atomic<int64_t>(0);
  w.slab_memory = slabs.get();
  w.tile_memory = tiles.get();
  w.cell_memory = tile_cells.get();
  w.done = done.get();
  run_on_threads(is_backward ? backward_entry : forward_entry, &w, int(threads), p.launcher);
  return 0;
}

}  // namespace
}  // namespace mpformer

#define EXPORT extern "C" __attribute__((visibility("default")))

// 0: done; 1: no memory; 2: this processor lacks the instruction set that was asked for.
EXPORT int mpformer_deform_attn_forward(const mpformer::Problem* p) { return mpformer::call(*p, false); }
EXPORT int mpformer_deform_attn_backward(const mpformer::Problem* p) { return mpformer::call(*p, true); }

// The name of kernel i of this build; null past the last one.
EXPORT const char* mpformer_deform_attn_kernel(int i) {
  return i >= 0 && i < mpformer::kKernels ? mpformer::kernels[i]->name : nullptr;
}
EXPORT int mpformer_deform_attn_runs_here(int i) { return mpformer::runs_here(i); }

// The hash of the sources this library was built from: a library of other sources is not used.
EXPORT const char* mpformer_deform_attn_source() { return MPFORMER_SOURCE_HASH; }
