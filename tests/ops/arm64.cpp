// Runs the deformable attention on a problem from a file, both ways, for another processor under emulation:
//   arm64 IN OUT
// IN: batch, S, queries, heads, channels, levels, points, type of value (int64 each), (height, width) of each
// level (int64), value, the gradient of the output, then locations and weights as float. OUT: the output, the
// gradients of value, locations and weights. All tensors are contiguous.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "deform_attn_cpu.h"

extern "C" int mpformer_deform_attn_forward(const mpformer::Problem*);
extern "C" int mpformer_deform_attn_backward(const mpformer::Problem*);

using Bytes = std::vector<char>;

static Bytes read(std::FILE* file, int64_t count) {
  Bytes bytes(count);
  if (std::fread(bytes.data(), 1, count, file) != size_t(count)) std::abort();
  return bytes;
}

static mpformer::Array array(Bytes& bytes, int64_t rows, int64_t heads, int64_t tail, int64_t type) {
  return {bytes.data(), rows * heads * tail, heads * tail, tail, int32_t(type)};
}

int main(int, char** names) {
  std::FILE* in = std::fopen(names[1], "rb");
  int64_t n[8];
  if (std::fread(n, sizeof(n), 1, in) != 1) return 9;
  const auto [batch, cells, queries, heads, channels, levels, points, type] = n;
  const int64_t size = type == mpformer::kFloat ? 4 : 2, samples = levels * points;
  Bytes shapes = read(in, levels * 16);
  Bytes value = read(in, batch * cells * heads * channels * size);
  Bytes grad = read(in, batch * queries * heads * channels * size);
  Bytes locations = read(in, batch * queries * heads * samples * 8);
  Bytes weights = read(in, batch * queries * heads * samples * 4);
  Bytes output(grad.size()), grad_value(value.size()), grad_points(locations.size()), grad_weights(weights.size());

  mpformer::Problem problem{};
  problem.value = array(value, cells, heads, channels, type);
  problem.points = array(locations, queries, heads, samples * 2, 0);
  problem.weights = array(weights, queries, heads, samples, 0);
  problem.output = array(output, queries, heads, channels, type);
  problem.shapes = reinterpret_cast<int64_t*>(shapes.data());
  problem.batch = batch, problem.queries = queries, problem.heads = heads, problem.channels = channels;
  problem.levels = levels, problem.points_per_level = points;
  problem.threads = 2, problem.instruction_set = -1;
  if (mpformer_deform_attn_forward(&problem) != 0) return 1;
  problem.output = array(grad, queries, heads, channels, type);
  problem.grad_value = array(grad_value, cells, heads, channels, type);
  problem.grad_points = array(grad_points, queries, heads, samples * 2, 0);
  problem.grad_weights = array(grad_weights, queries, heads, samples, 0);
  if (mpformer_deform_attn_backward(&problem) != 0) return 2;

  std::FILE* out = std::fopen(names[2], "wb");
  for (const Bytes* bytes : {&output, &grad_value, &grad_points, &grad_weights})
    std::fwrite(bytes->data(), 1, bytes->size(), out);
  return std::fclose(out);
}
