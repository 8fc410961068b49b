// Full softmax over a catalogue whose logits for a block of tokens fit the cache: log-sum-exp and both gradients at weight
// one, from three matrix products written here so that the exponential sits between them without another trip to memory.
//
// Tokens come in groups of 24, whose logits fit the second cache, and items in tiles of 48; both padded. All sums run over
// tokens and items in one fixed order, whatever the number of threads.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "simd.h"

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using gr::Simd;

constexpr int64_t kGroup = 24;
constexpr int64_t kTile = 48;
// Logits of a block: 4 MB of float32, or one group a thread.
constexpr int64_t kBlockLogits = int64_t{1} << 20;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// c[row][0 .. kVectors) (+)= sum_k a[row * row_step + k * depth_step] * b[k * b_step ..], kRows rows held in registers.
template <class T, int kRows, int kVectors, bool kAdd>
inline void product(const T* a, int64_t row_step, int64_t depth_step, const T* b, int64_t b_step, int64_t depth, T* c,
                    int64_t c_step) {
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::Vec total[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    typename Simd<T>::Vec right[kVectors];
    for (int i = 0; i < kVectors; ++i) right[i] = gr::load(b + k * b_step + i * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const T left = a[row * row_step + k * depth_step];
      for (int i = 0; i < kVectors; ++i) total[row][i] += left * right[i];
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kVectors; ++i) {
      T* to = c + row * c_step + i * kLanes;
      gr::store(to, kAdd ? gr::load(to) + total[row][i] : total[row][i]);
    }
  }
}

// Adds A (kRows x kDepth, any steps) times B (kDepth x width) to C (kRows x width), a cache line of columns at a time.
template <class T, int64_t kRows, int64_t kDepth>
void add_product(const T* a, int64_t row_step, int64_t depth_step, const T* b, int64_t vectors, int64_t stride, T* c) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t first = 0; first < vectors; first += 2) {
    const T* right = b + first * kLanes;
    for (int64_t row = 0; row < kRows; row += 6) {
      const T* left = a + row * row_step;
      T* to = c + row * stride + first * kLanes;
      if (vectors - first >= 2) {
        product<T, 6, 2, true>(left, row_step, depth_step, right, stride, kDepth, to, stride);
      } else {
        product<T, 6, 1, true>(left, row_step, depth_step, right, stride, kDepth, to, stride);
      }
    }
  }
}

template <class T>
struct Problem {
  const T* queries;  // (T, D), temperature applied
  const T* items;    // (X, D)
  int64_t tokens, count, width;
  int64_t stride, padded_count, vectors;
  gr::Buffer<T> rows;    // items, padded: (padded_count, stride)
  gr::Buffer<T> panels;  // items transposed in panels of two vectors: (padded_count / panel, width, panel)
};

template <class T>
constexpr int64_t kPanel = 2 * Simd<T>::kLanes;

template <class T>
void pack_items(Problem<T>& p) {
  p.rows = gr::allocate<T>(p.padded_count * p.stride);
  p.panels = gr::allocate<T>(p.padded_count * p.width);
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < p.padded_count; first += kPanel<T>) {
    T* panel = p.panels.get() + first * p.width;
    for (int64_t lane = 0; lane < kPanel<T>; ++lane) {
      const int64_t x = first + lane;
      T* row = p.rows.get() + x * p.stride;
      for (int64_t d = 0; d < p.stride; ++d) row[d] = x < p.count && d < p.width ? p.items[x * p.width + d] : T(0);
      for (int64_t d = 0; d < p.width; ++d) panel[d * kPanel<T> + lane] = row[d];
    }
  }
}

// Turns a row of logits into exp(logit - largest), zero in the padding; returns the sum.
template <class T>
T exponentials(T* row, int64_t count, int64_t padded_count, T* largest_out) {
  const T largest = gr::maximum(row, count);
  T total = 0;
  for (int64_t x = 0; x < count; ++x) {
    row[x] = gr::fast_exp(row[x] - largest);
    total += row[x];
  }
  std::fill(row + count, row + padded_count, T(0));
  *largest_out = largest;
  return total;
}

// One group of tokens: its weights exp(logit - largest), log-sum-exp and mean item; leaves query / sum in `scaled`.
template <class T>
void forward_group(const Problem<T>& p, int64_t first, T* weights, T* scaled, T* lse, T* means) {
  auto mean = gr::allocate<T>(kGroup * p.stride);
  std::fill(mean.get(), mean.get() + kGroup * p.stride, T(0));
  const int64_t used = std::min(kGroup, p.tokens - first);
  for (int64_t t = 0; t < kGroup; ++t) {
    T* row = scaled + t * p.stride;
    std::fill(row, row + p.stride, T(0));
    if (t < used) std::copy(p.queries + (first + t) * p.width, p.queries + (first + t + 1) * p.width, row);
  }
  for (int64_t x = 0; x < p.padded_count; x += kPanel<T>) {
    const T* panel = p.panels.get() + x * p.width;
    for (int64_t t = 0; t < kGroup; t += 6) {
      product<T, 6, 2, false>(scaled + t * p.stride, p.stride, 1, panel, kPanel<T>, p.width,
                              weights + t * p.padded_count + x, p.padded_count);
    }
  }
  T totals[kGroup];
  for (int64_t t = 0; t < used; ++t) {
    T largest;
    totals[t] = exponentials(weights + t * p.padded_count, p.count, p.padded_count, &largest);
    lse[first + t] = largest + std::log(totals[t]);
  }
  std::fill(weights + used * p.padded_count, weights + kGroup * p.padded_count, T(0));
  for (int64_t x = 0; x < p.padded_count; x += kTile) {
    add_product<T, kGroup, kTile>(weights + x, p.padded_count, 1, p.rows.get() + x * p.stride, p.vectors, p.stride, mean.get());
  }
  for (int64_t t = 0; t < used; ++t) {
    const T scale = T(1) / totals[t];
    for (int64_t d = 0; d < p.width; ++d) {
      means[(first + t) * p.width + d] = mean[t * p.stride + d] * scale;
      scaled[t * p.stride + d] *= scale;
    }
  }
}

template <class T>
void forward(const T* queries, const T* items, int64_t tokens, int64_t count, int64_t width, T* lse, T* means, T* mass) {
  Problem<T> p{queries, items, tokens, count, width, gr::padded<T>(width), round_up(count, kTile),
               gr::vectors<T>(width), nullptr, nullptr};
  pack_items(p);
  const int64_t wanted = std::max<int64_t>(kBlockLogits / (kGroup * p.padded_count), omp_get_max_threads());
  const int64_t groups = std::min(wanted, round_up(tokens, kGroup) / kGroup);
  const auto weights = gr::allocate<T>(groups * kGroup * p.padded_count);
  const auto scaled = gr::allocate<T>(groups * kGroup * p.stride);
  const auto sums = gr::allocate<T>(p.padded_count * p.stride);
  std::fill(sums.get(), sums.get() + p.padded_count * p.stride, T(0));
#pragma omp parallel
  for (int64_t block = 0; block < tokens; block += groups * kGroup) {
    const int64_t here = std::min(groups, round_up(tokens - block, kGroup) / kGroup);
#pragma omp for schedule(dynamic, 1)
    for (int64_t g = 0; g < here; ++g) {
      forward_group(p, block + g * kGroup, weights.get() + g * kGroup * p.padded_count,
                    scaled.get() + g * kGroup * p.stride, lse, means);
    }
#pragma omp for schedule(static)
    for (int64_t x = 0; x < p.padded_count; x += kTile) {
      for (int64_t g = 0; g < here; ++g) {
        add_product<T, kTile, kGroup>(weights.get() + g * kGroup * p.padded_count + x, 1, p.padded_count,
                    scaled.get() + g * kGroup * p.stride, p.vectors, p.stride, sums.get() + x * p.stride);
      }
    }
  }
  for (int64_t x = 0; x < count; ++x) std::copy_n(sums.get() + x * p.stride, width, mass + x * width);
}

}  // namespace

// lse (T), means (T, D) = sum_x p[t, x] items[x], mass (X, D) = sum_t p[t, x] queries[t]; X >= 1.
GR_EXPORT void forward_f32(const float* queries, const float* items, int64_t tokens, int64_t count, int64_t width,
                           float* lse, float* means, float* mass) {
  forward(queries, items, tokens, count, width, lse, means, mass);
}

GR_EXPORT void forward_f64(const double* queries, const double* items, int64_t tokens, int64_t count, int64_t width,
                           double* lse, double* means, double* mass) {
  forward(queries, items, tokens, count, width, lse, means, mass);
}
