// Sums of weighted source rows by id. Threads own disjoint cache lines of every output row and visit the entries in
// their order, so the sums do not depend on the number of threads.
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "simd.h"

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using gr::Simd;

template <class T>
struct Problem {
  const int64_t* ids;   // (N,)
  const int64_t* rows;  // (N,) or null: n itself
  const T* weights;     // (N,) or null: ones
  const T* source;      // (S, D)
  int64_t entries, num_rows, width;
};

// Adds the columns [first, last) of every entry to `sums`, whose rows are `stride` apart.
template <class T>
void add_columns(const Problem<T>& p, int64_t first, int64_t last, int64_t stride, T* sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t n = 0; n < p.entries; ++n) {
    if (p.ids[n] < 0 || p.ids[n] >= p.num_rows) continue;
    const T weight = p.weights ? p.weights[n] : T(1);
    const T* from = p.source + (p.rows ? p.rows[n] : n) * p.width;
    T* to = sums + p.ids[n] * stride;
    int64_t d = first;
    for (; d + kLanes <= last; d += kLanes) gr::store(to + d, gr::load(to + d) + weight * gr::load(from + d));
    for (; d < last; ++d) to[d] += weight * from[d];
  }
}

template <class T>
void row_sums(const Problem<T>& p, T* out) {
  const int64_t stride = gr::padded<T>(p.width);
  const auto scratch = stride == p.width ? nullptr : gr::allocate<T>(p.num_rows * stride);
  T* sums = scratch ? scratch.get() : out;
  const int64_t lines = stride / gr::kLine<T>;
  const int64_t slices = std::min<int64_t>(lines, omp_get_max_threads());
#pragma omp parallel for schedule(static)
  for (int64_t v = 0; v < p.num_rows; ++v) std::fill_n(sums + v * stride, stride, T(0));
#pragma omp parallel for schedule(static, 1)
  for (int64_t s = 0; s < slices; ++s) {
    const int64_t last = std::min(lines * (s + 1) / slices * gr::kLine<T>, p.width);
    add_columns(p, lines * s / slices * gr::kLine<T>, last, stride, sums);
  }
  if (!scratch) return;
#pragma omp parallel for schedule(static)
  for (int64_t v = 0; v < p.num_rows; ++v) std::copy_n(sums + v * stride, p.width, out + v * p.width);
}

}  // namespace

// The first entry with an id in [0, num_rows) whose row is outside [0, sources), or -1.
GR_EXPORT int64_t row_outside(const int64_t* ids, const int64_t* rows, int64_t entries, int64_t num_rows,
                              int64_t sources) {
  for (int64_t n = 0; n < entries; ++n) {
    if (ids[n] >= 0 && ids[n] < num_rows && (rows[n] < 0 || rows[n] >= sources)) return n;
  }
  return -1;
}

GR_EXPORT void row_sums_f32(const int64_t* ids, const int64_t* rows, const float* weights, const float* source,
                            int64_t entries, int64_t num_rows, int64_t width, float* out) {
  row_sums(Problem<float>{ids, rows, weights, source, entries, num_rows, width}, out);
}

GR_EXPORT void row_sums_f64(const int64_t* ids, const int64_t* rows, const double* weights, const double* source,
                            int64_t entries, int64_t num_rows, int64_t width, double* out) {
  row_sums(Problem<double>{ids, rows, weights, source, entries, num_rows, width}, out);
}
