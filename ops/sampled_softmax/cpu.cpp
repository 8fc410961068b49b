// Sampled softmax without the (tokens, negatives, width) tensor; formulas in ops/sampled_softmax/__init__.py.
//
// Forward walks a token's R rows once for the logits and, while they are still in the first cache, once more for the
// query's gradient per unit of loss. Backward scatters into the table gradient: threads own disjoint cache lines of
// every row and visit the pairs in one fixed order, so the sums do not depend on the number of threads.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using gr::Simd;

constexpr double kSameAsPositive = -5e4;
constexpr int64_t kPrefetchAhead = 8;

template <class T>
struct Problem {
  const T* queries;         // (T, D)
  const T* table;           // (V, D)
  const int64_t* positive;  // (T,)
  const int64_t* negative;  // (T, R)
  const T* log_q;           // (V,) or null
  int64_t tokens, negatives, width, rows;
  double temperature, eps;
  bool l2_norm;
};

template <class T>
T inverse_norm(const T* row, int64_t width, double eps) {
  T squares = 0;
  for (int64_t d = 0; d < width; ++d) squares += row[d] * row[d];
  return T(1) / std::max(std::sqrt(squares), static_cast<T>(eps));
}

// The table with rows of whole cache lines, normalized where asked. As large as the dense gradient, so never the worst.
template <class T>
gr::Buffer<T> prepared_table(const Problem<T>& p, int64_t stride) {
  if (!p.l2_norm && stride == p.width) return nullptr;
  auto rows = gr::allocate<T>(p.rows * stride);
#pragma omp parallel for schedule(static)
  for (int64_t v = 0; v < p.rows; ++v) {
    const T* from = p.table + v * p.width;
    T* to = rows.get() + v * stride;
    const T scale = p.l2_norm ? inverse_norm(from, p.width, p.eps) : T(1);
    for (int64_t d = 0; d < p.width; ++d) to[d] = from[d] * scale;
    std::fill(to + p.width, to + stride, T(0));
  }
  return rows;
}

template <class T, int kVectors>
T dot(const T* a, const T* b, int vectors) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int count = kVectors ? kVectors : vectors;
  typename Simd<T>::Vec even = gr::load(a) * gr::load(b), odd = {};
  int i = 1;
  for (; i + 1 < count; i += 2) {
    odd += gr::load(a + i * kLanes) * gr::load(b + i * kLanes);
    even += gr::load(a + (i + 1) * kLanes) * gr::load(b + (i + 1) * kLanes);
  }
  if (i < count) odd += gr::load(a + i * kLanes) * gr::load(b + i * kLanes);
  return gr::sum(even + odd);
}

// sum_r weights[r] * rows[ids[r]] added into out, in registers for the widths of the templates.
template <class T, int kVectors>
void add_weighted_rows(const T* weights, const int64_t* ids, int64_t count, const T* rows, int64_t stride, int vectors,
                       T* out) {
  constexpr int kLanes = Simd<T>::kLanes;
  if constexpr (kVectors > 0) {
    typename Simd<T>::Vec total[kVectors];
    for (int i = 0; i < kVectors; ++i) total[i] = gr::load(out + i * kLanes);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = rows + ids[r] * stride;
      const T weight = weights[r];
      for (int i = 0; i < kVectors; ++i) total[i] += weight * gr::load(row + i * kLanes);
    }
    for (int i = 0; i < kVectors; ++i) gr::store(out + i * kLanes, total[i]);
  } else {
    for (int64_t r = 0; r < count; ++r) {
      const T* row = rows + ids[r] * stride;
      const T weight = weights[r];
      for (int i = 0; i < vectors; ++i) {
        gr::store(out + i * kLanes, gr::load(out + i * kLanes) + weight * gr::load(row + i * kLanes));
      }
    }
  }
}

// Softmax over `logits` (R) and `positive`; leaves the negatives' probabilities in `logits`.
template <class T>
T softmax_in_place(T* logits, int64_t count, T positive, T* positive_probability) {
  const T largest = count ? std::max(positive, gr::maximum(logits, count)) : positive;
  T total = 0;
  for (int64_t r = 0; r < count; ++r) {
    logits[r] = gr::fast_exp(logits[r] - largest);
    total += logits[r];
  }
  const T own = gr::fast_exp(positive - largest);
  total += own;
  *positive_probability = own / total;
  const T scale = T(1) / total;
  for (int64_t r = 0; r < count; ++r) logits[r] *= scale;
  return std::log(total) + largest - positive;
}

template <class T, int kVectors>
void forward_tokens(const Problem<T>& p, const T* rows, int64_t stride, T* losses, T* slopes, T* probabilities) {
  const int vectors = static_cast<int>(gr::vectors<T>(p.width));
  const T inverse_temperature = static_cast<T>(1 / p.temperature);
#pragma omp parallel
  {
    auto query = gr::allocate<T>(stride);
    auto slope = gr::allocate<T>(stride);
    auto scratch = gr::allocate<T>(p.negatives);
    std::fill(query.get(), query.get() + stride, T(0));
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t positive = p.positive[t];
      const int64_t* ids = p.negative + t * p.negatives;
      T* weights = probabilities ? probabilities + t * p.negatives : scratch.get();
      for (int64_t d = 0; d < p.width; ++d) query[d] = p.queries[t * p.width + d] * inverse_temperature;
      const T* positive_row = rows + positive * stride;
      T own = dot<T, kVectors>(query.get(), positive_row, vectors);
      if (p.log_q) own -= p.log_q[positive];
      for (int64_t r = 0; r < p.negatives; ++r) {
        if (r + kPrefetchAhead < p.negatives) {
          const char* next = reinterpret_cast<const char*>(rows + ids[r + kPrefetchAhead] * stride);
          for (int byte = 0; byte < vectors * 32; byte += 64) __builtin_prefetch(next + byte);
        }
        weights[r] = dot<T, kVectors>(query.get(), rows + ids[r] * stride, vectors);
      }
      if (p.log_q) {
        for (int64_t r = 0; r < p.negatives; ++r) weights[r] -= p.log_q[ids[r]];
      }
      for (int64_t r = 0; r < p.negatives; ++r) {
        weights[r] = ids[r] == positive ? static_cast<T>(kSameAsPositive) : weights[r];
      }
      T own_probability;
      losses[t] = softmax_in_place(weights, p.negatives, own, &own_probability);
      if (!slopes) continue;
      // A masked logit is a constant: it takes part in the sum but passes no gradient.
      for (int64_t r = 0; r < p.negatives; ++r) weights[r] = ids[r] == positive ? T(0) : weights[r];
      std::fill(slope.get(), slope.get() + stride, T(0));
      const T own_weight = own_probability - T(1);
      // The one large term last: small terms added to it would each lose bits.
      add_weighted_rows<T, kVectors>(weights, ids, p.negatives, rows, stride, vectors, slope.get());
      add_weighted_rows<T, kVectors>(&own_weight, &positive, 1, rows, stride, vectors, slope.get());
      for (int64_t d = 0; d < p.width; ++d) slopes[t * p.width + d] = slope[d] * inverse_temperature;
    }
  }
}

// Calls `body` with the number of vectors of a row as a compile-time constant, 0 for wide rows.
template <class Body>
void with_vectors(int64_t vectors, Body body) {
  switch (vectors) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    case 8: return body(std::integral_constant<int, 8>{});
    default: return body(std::integral_constant<int, 0>{});
  }
}

// Index of the first id outside [0, rows), or -1.
int64_t first_outside(const int64_t* ids, int64_t count, int64_t rows) {
  int64_t first = std::numeric_limits<int64_t>::max();
#pragma omp parallel for schedule(static) reduction(min : first) if (count > 65536)
  for (int64_t i = 0; i < count; ++i) {
    if (static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(rows)) first = std::min(first, i);
  }
  return first == std::numeric_limits<int64_t>::max() ? -1 : first;
}

template <class T>
void forward(const Problem<T>& p, T* losses, T* slopes, T* probabilities) {
  const int64_t stride = gr::padded<T>(p.width);
  const auto prepared = prepared_table(p, stride);
  const T* rows = prepared ? prepared.get() : p.table;
  with_vectors(gr::vectors<T>(p.width), [&](auto count) {
    forward_tokens<T, decltype(count)::value>(p, rows, stride, losses, slopes, probabilities);
  });
}

// Adds every pair's contribution to the vectors [first, first + count) of the gradient rows; the positives, whose terms
// are large, in a second pass after the many small ones.
template <class T, int kVectors>
void scatter_slice(const Problem<T>& p, const T* grads, const T* losses, const T* probabilities, int64_t stride,
                   int64_t first, int vectors, T* gradient) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int count = kVectors ? kVectors : vectors;
  const T inverse_temperature = static_cast<T>(1 / p.temperature);
  const int64_t offset = first * kLanes;
  const int64_t used = std::min<int64_t>(count * kLanes, p.width - offset);
  auto query = gr::allocate<T>(count * kLanes);
  std::fill(query.get(), query.get() + count * kLanes, T(0));
  const auto load_query = [&](int64_t t) {
    const T scale = grads[t] * inverse_temperature;
    for (int64_t d = 0; d < used; ++d) query[d] = p.queries[t * p.width + offset + d] * scale;
  };
  const auto add = [&](int64_t id, T weight) {
    T* row = gradient + id * stride + offset;
    for (int i = 0; i < count; ++i) {
      gr::store(row + i * kLanes, gr::load(row + i * kLanes) + weight * gr::load(query.get() + i * kLanes));
    }
  };
  for (int64_t t = 0; t < p.tokens; ++t) {
    load_query(t);
    const int64_t* ids = p.negative + t * p.negatives;
    const T* weights = probabilities + t * p.negatives;
    for (int64_t r = 0; r < p.negatives; ++r) add(ids[r], weights[r]);
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    load_query(t);
    add(p.positive[t], std::expm1(-losses[t]));
  }
}

// Copies the padded gradient out, through the normalization v / max(|v|, eps) where it was used.
template <class T>
void finish_rows(const Problem<T>& p, int64_t stride, const T* gradient, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t v = 0; v < p.rows; ++v) {
    const T* row = p.table + v * p.width;
    const T* from = gradient + v * stride;
    T* to = out + v * p.width;
    if (!p.l2_norm) {
      if (to != from) std::copy(from, from + p.width, to);
      continue;
    }
    const T inverse = inverse_norm(row, p.width, p.eps);
    T along = 0;
    for (int64_t d = 0; d < p.width; ++d) along += row[d] * from[d];
    // Below eps the divisor is the constant eps and nothing is projected out.
    along = inverse * static_cast<T>(p.eps) < T(1) ? along * inverse * inverse : T(0);
    for (int64_t d = 0; d < p.width; ++d) to[d] = inverse * (from[d] - along * row[d]);
  }
}

template <class T>
void backward_table(const Problem<T>& p, const T* grads, const T* losses, const T* probabilities, T* out) {
  const int64_t stride = gr::padded<T>(p.width);
  const bool in_place = stride == p.width;
  const auto scratch = in_place ? nullptr : gr::allocate<T>(p.rows * stride);
  T* gradient = in_place ? out : scratch.get();
  const int64_t vectors = gr::vectors<T>(p.width);
  constexpr int64_t kLineVectors = 64 / 32;
  const int64_t lines = (vectors + kLineVectors - 1) / kLineVectors;
  const int64_t slices = std::min<int64_t>(lines, omp_get_max_threads());
#pragma omp parallel for schedule(static)
  for (int64_t v = 0; v < p.rows; ++v) std::fill(gradient + v * stride, gradient + (v + 1) * stride, T(0));
#pragma omp parallel for schedule(static, 1)
  for (int64_t s = 0; s < slices; ++s) {
    const int64_t first = lines * s / slices * kLineVectors;
    const int64_t last = std::min(lines * (s + 1) / slices * kLineVectors, vectors);
    with_vectors(last - first, [&](auto count) {
      scatter_slice<T, decltype(count)::value>(p, grads, losses, probabilities, stride, first,
                                               static_cast<int>(last - first), gradient);
    });
  }
  finish_rows(p, stride, gradient, out);
}

}  // namespace

GR_EXPORT int64_t ids_outside(const int64_t* ids, int64_t count, int64_t rows) {
  return first_outside(ids, count, rows);
}

#define GR_SAMPLED_SOFTMAX(T, SUFFIX)                                                                                 \
  GR_EXPORT void forward_##SUFFIX(const T* queries, const T* table, const int64_t* positive, const int64_t* negative, \
                                  const T* log_q, int64_t tokens, int64_t negatives, int64_t width, int64_t rows,     \
                                  double temperature, double eps, int l2_norm, T* losses, T* slopes,                  \
                                  T* probabilities) {                                                                 \
    const Problem<T> p{queries, table, positive, negative,    log_q, tokens,                                          \
                       negatives, width, rows,   temperature, eps,   l2_norm != 0};                                   \
    forward(p, losses, slopes, probabilities);                                                                        \
  }                                                                                                                   \
  GR_EXPORT void backward_##SUFFIX(const T* queries, const T* table, const int64_t* positive,                         \
                                   const int64_t* negative, int64_t tokens, int64_t negatives, int64_t width,         \
                                   int64_t rows, double temperature, double eps, int l2_norm, const T* grads,         \
                                   const T* losses, const T* probabilities, T* out) {                                 \
    const Problem<T> p{queries, table, positive, negative,    nullptr, tokens,                                        \
                       negatives, width, rows,   temperature, eps,     l2_norm != 0};                                 \
    backward_table(p, grads, losses, probabilities, out);                                                             \
  }

GR_SAMPLED_SOFTMAX(float, f32)
GR_SAMPLED_SOFTMAX(double, f64)
