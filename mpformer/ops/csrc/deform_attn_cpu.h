// Multi-scale deformable attention on the CPU: the data that the entry points, the task queue and the kernels
// share.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpformer {

enum Type : int32_t { kFloat = 0, kBfloat16 = 1, kHalf = 2 };

// A tensor [batch, row, head, ...] whose dimensions after the head are contiguous; strides count elements.
struct Array {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
  int32_t type;
};

// A call. Filled in by mpformer/ops/cpu.py, which mirrors this layout with ctypes.
struct Problem {
  Array value;            // [B, S, heads, D]
  Array reference;        // [B or 1, Q, -, levels, 2]: null data unless the call is fused
  Array points;           // [B, Q, heads, levels, points, 2]: locations, or offsets in cells if fused
  Array weights;          // [B, Q, heads, levels, points]: attention weights, or logits if fused
  Array output;           // [B, Q, heads, D]: written by forward, the incoming gradient of backward
  Array grad_value;       // as value, written by backward only
  Array grad_points;      // as points, always float
  Array grad_weights;     // as weights, always float
  const int64_t* shapes;  // levels x (height, width)
  void* launcher;         // GOMP_parallel of the OpenMP that torch runs on, or null: threads of our own
  int64_t batch, queries, heads, channels, levels, points_per_level;
  int32_t threads;
  int32_t instruction_set;  // index into the kernels of this build, -1: the best that this processor has
};

// A level inside a slab. A slab holds one head of one image in float: every level has a border of one zero
// cell on each side and two zero rows below, so that no corner of a sample needs a test, and samples outside
// read zeros.
struct Level {
  int32_t height, width;
  int32_t pitch;  // cells per row: width + 2
  int32_t zero;   // a cell whose own and three neighbouring cells are zero, counted from the level's first
  int64_t first_cell;  // of the level in a slab of all levels
  int64_t first_row;   // of the level in value's S
};

constexpr int kTile = 32;  // queries whose points are prepared together; a multiple of every vector length

// What one thread needs besides slabs, all [..., kTile] with the query last.
struct Tile {
  float* coordinates;  // [points * 2]
  float* reference;    // [levels * 2]
  float* weights;      // [points]
  float* fraction_x;   // [points]
  float* fraction_y;   // [points]
  float* corner[4];    // [points] bilinear weights, later the dot products of the backward pass
  int32_t* cell;       // [points]
};

struct Kernel {
  const char* name;
  int lanes;
  // Copies one level of (batch, head) into a slab with its zero border; rows [row0, row1) of the bordered
  // level.
  void (*pack)(const Problem&, const Level&, int64_t b, int64_t h, int64_t row0, int64_t row1,
               float* level_slab);
  void (*forward)(const Problem&, const Level*, int64_t b, int64_t h, int64_t q0, int64_t q1,
                  const float* slab, const Tile&);
  // All queries of levels [level0, level1): grad_value of those levels, grad_points, and the gradient of the
  // weights; if the range has all levels, that of the logits.
  void (*backward)(const Problem&, const Level*, int64_t level0, int64_t level1, int64_t b, int64_t h,
                   const float* value_slab, float* grad_slab, const Tile&);
  // Turns the gradient of the weights into that of the logits, in place.
  void (*softmax_backward)(const Problem&, int64_t b, int64_t h, int64_t q0, int64_t q1, const Tile&);
};

extern const Kernel kernel_plain;
#if defined(__x86_64__)
extern const Kernel kernel_avx2, kernel_avx512;
#endif

// Static, not inline: one of several copies that the linker might keep could be the one for AVX-512.
static int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static int64_t cells_of(const Level& level) { return int64_t(level.height + 3) * level.pitch; }

}  // namespace mpformer
