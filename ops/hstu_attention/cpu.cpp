// HSTU attention on jagged rows for CPUs: forward and backward in one pass over tiles, float and double.
//
//   out = dropout(SiLU(alpha q k^T + bias) * scale, where valid) v    (ops/hstu_attention/__init__.py has the contract)
//
// A task is one (jagged row, head): its keys and values are packed once into panels of kPanel columns, so that every
// product below is the same register-blocked outer-product kernel. Queries go in tiles of kQueries, keys in tiles of
// kKeys; scores exist for one tile at a time and backward computes them again. Every output row belongs to one task;
// gradients of the bias tables are summed in double per fixed chunk of tasks, then in chunk order, so that results do
// not depend on the thread count.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "counter_random.h"
#include "hstu_attention/products.h"
#include "hstu_attention/time_buckets.h"

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using gr::Buckets;
using gr::ceil_div;
using gr::kBlock;
using gr::panels;
using gr::Simd;

constexpr int64_t kQueries = 48;  // queries of a tile, a multiple of kBlock
constexpr int64_t kKeys = 96;     // keys of a tile, a multiple of kBlock and of every kPanel
constexpr int64_t kDirect = 6;    // up to so many queries of a row are not worth packing its keys and values
constexpr int64_t kChunks = 128;  // parts of the table gradients; a constant, as the order of summation depends on it
constexpr int64_t kCopies = 4;    // histograms side by side, so that runs of one bucket do not wait for each other

// Mirrors `_Problem` in cpu.py field by field; every field is 8 bytes wide. Pointers may be null where optional.
struct Problem {
  const void *q, *k, *v, *scales, *position_weights, *time_weights;
  const int64_t *offsets, *query_times, *key_times, *num_targets, *row_keys, *thresholds;
  // Null where queries and keys are the same rows. Otherwise, of jagged row b: its queries are [q_offsets[b],
  // q_offsets[b + 1]), the last of row_lengths[b] positions; its keys are key_counts[b] from offsets[b] on, the first of
  // them at position key_origins[b].
  const int64_t *q_offsets, *row_lengths, *key_counts, *key_origins;
  void* out;
  const void* grad_out;
  void *grad_q, *grad_k, *grad_v, *grad_position, *grad_time;
  int64_t batch, total, queries, heads, key_dim, value_dim;
  // Elements from one flat row to the next; the (head, dim) part of a row is contiguous.
  int64_t q_stride, k_stride, v_stride, grad_out_stride;
  int64_t max_seq_len, position_heads, time_heads, num_buckets;
  int64_t max_attn_len, contextual_seq_len, min_full_attn_seq_len;
  int64_t dropout, dropout_threshold, dropout_seed, threads;
  int64_t accumulate;  // add to `out`
  double alpha, scale, dropout_factor;
};

enum Status : int64_t { kOk = 0, kBadOffsets = 1, kRowTooLong = 2, kBadRows = 3 };

int64_t key_count(const Problem& p, int64_t row) {
  return p.key_counts != nullptr ? p.key_counts[row] : p.offsets[row + 1] - p.offsets[row];
}

int64_t row_length(const Problem& p, int64_t row) {
  return p.row_lengths != nullptr ? p.row_lengths[row] : p.offsets[row + 1] - p.offsets[row];
}

int64_t first_query(const Problem& p, int64_t row) { return (p.q_offsets != nullptr ? p.q_offsets : p.offsets)[row]; }

int64_t query_count(const Problem& p, int64_t row) { return first_query(p, row + 1) - first_query(p, row); }

// Keys one query sees: [low, high), and itself where that lies outside (own >= 0).
struct Span {
  int64_t low, high, own;
};

// Ids do not decrease along a row, so that every rule of the mask is a range of keys.
class Mask {
 public:
  Mask(const Problem& p, int64_t row, int64_t length)
      : length_(length),
        shift_(p.contextual_seq_len > 0 ? p.contextual_seq_len - 1 : 0),
        max_id_(length - shift_ - (p.num_targets != nullptr ? p.num_targets[row] : 0)),
        has_targets_(p.num_targets != nullptr),
        has_context_(p.contextual_seq_len > 0),
        window_(p.max_attn_len),
        full_(p.min_full_attn_seq_len) {}

  Span operator()(int64_t position) const {
    int64_t id = std::max<int64_t>(position - shift_, 0);
    if (has_targets_) id = std::min(id, max_id_);
    Span span{0, keys_below(id), -1};
    const bool windowed = window_ > 0 && !(full_ > 0 && id >= max_id_ - full_);
    if (windowed) span.low = keys_below(id - window_);
    if (has_context_ && id == 0) span = {0, keys_below(max_id_), -1};
    if (span.low >= span.high) return {position, position + 1, -1};
    if (position == span.high) ++span.high;
    if (position < span.low || position >= span.high) span.own = position;
    return span;
  }

 private:
  // How many keys of the row have an id below this one.
  int64_t keys_below(int64_t id) const {
    if (has_targets_ && max_id_ < id) return length_;
    return id <= 0 ? 0 : std::min(length_, id + shift_);
  }

  int64_t length_, shift_, max_id_;
  bool has_targets_, has_context_;
  int64_t window_, full_;
};

struct Task {
  int64_t row, head, first, count;  // queries [first, first + count) of the row's own, in order of position
  int64_t cost;
};

// Memory of one thread, handed out in pieces that start at a cache line.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = std::max<int64_t>(count, 1) * sizeof(T);
    blocks_.emplace_back(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
    return reinterpret_cast<T*>(blocks_.back().get());
  }

 private:
  struct Free {
    void operator()(char* block) const { ::operator delete(block, std::align_val_t{64}); }
  };
  std::vector<std::unique_ptr<char, Free>> blocks_;
};

// Gradients of the bias tables over one chunk of tasks, which share a head.
struct TableSums {
  double* position;  // (2n - 1,)
  double* time;      // (num_buckets + 1, kCopies)
};

// exp to about 2 units in the last place. Fused steps, which the compiler may not reassociate; NaN stays NaN.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float n = __builtin_rintf(x * 1.44269504f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float y = 1.9875691500e-4f;
  y = std::fma(y, r, 1.3981999507e-3f);
  y = std::fma(y, r, 8.3334519073e-3f);
  y = std::fma(y, r, 4.1665795894e-2f);
  y = std::fma(y, r, 1.6666665459e-1f);
  y = std::fma(y, r, 5.0000001201e-1f);
  y = std::fma(y, r * r, r + 1.0f);
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return y * power;
}

inline double exponential(double x) { return std::exp(x); }

// Below it SiLU and its slope are nothing, but the exponential, which ends at 88, would say otherwise of -1e38.
template <class T>
inline T not_far_below(T z) {
  return z < T(-87) ? T(-87) : z;
}

// to[j] += table[index[j]]; whole vectors, so that both arrays have Buckets::kPadding more elements than count.
inline void add_looked_up(const float* table, const int32_t* index, int64_t count, float* to) {
  int64_t j = 0;
#ifdef __AVX2__
  for (; j < count; j += 8) {
    const __m256 found = _mm256_i32gather_ps(table, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + j)), 4);
    _mm256_storeu_ps(to + j, _mm256_add_ps(_mm256_loadu_ps(to + j), found));
  }
#endif
  for (; j < count; ++j) to[j] += table[index[j]];
}

inline void add_looked_up(const double* table, const int32_t* index, int64_t count, double* to) {
  for (int64_t j = 0; j < count; ++j) to[j] += table[index[j]];
}

// scores := SiLU(alpha * scores + bias) * factor
template <class T>
void activate(int64_t count, T alpha, const T* __restrict bias, const T* __restrict factor, T* __restrict scores) {
  for (int64_t j = 0; j < count; ++j) {
    const T z = not_far_below(alpha * scores[j] + bias[j]);
    scores[j] = z * factor[j] / (T(1) + exponential(-z));
  }
}

// The same, and grads (of the weights) become grads of alpha * scores + bias.
template <class T>
void activate_backward(int64_t count, T alpha, const T* __restrict bias, const T* __restrict factor,
                       T* __restrict scores, T* __restrict grads) {
  for (int64_t j = 0; j < count; ++j) {
    const T z = not_far_below(alpha * scores[j] + bias[j]);
    const T gate = T(1) / (T(1) + exponential(-z));
    const T scaled = gate * factor[j];
    scores[j] = z * scaled;
    grads[j] *= scaled + z * scaled * (T(1) - gate);
  }
}

// Everything a thread needs for a task, and the steps forward and backward share.
template <class T>
class Worker {
 public:
  Worker(const Problem& p, const Buckets& buckets, int64_t longest, bool backward) : p_(p), bucket_of_(buckets) {
    const int64_t padded = ceil_div(longest, kPanel) * kPanel;
    key_columns_ = arena_.take<T>(padded * p.key_dim);
    times_ = arena_.take<int32_t>(padded + Buckets::kPadding);
    std::fill_n(times_, padded + Buckets::kPadding, 0);
    queries_ = arena_.take<T>(kQueries * p.key_dim);
    scores_ = arena_.take<T>(kQueries * kKeys);
    bias_ = arena_.take<T>(kKeys + Buckets::kPadding);
    factor_ = arena_.take<T>(kKeys);
    bucket_ = arena_.take<int32_t>(kKeys + Buckets::kPadding);
    std::fill_n(bucket_, kKeys + Buckets::kPadding, 0);
    if (!backward) {
      values_ = arena_.take<T>(panels<T>(p.value_dim) * kPanel * longest);
      out_ = arena_.take<T>(panels<T>(p.value_dim) * kPanel * kQueries);
      return;
    }
    value_columns_ = arena_.take<T>(padded * p.value_dim);
    keys_ = arena_.take<T>(panels<T>(p.key_dim) * kPanel * longest);
    grad_keys_ = arena_.take<T>(panels<T>(p.key_dim) * kPanel * longest);
    grad_values_ = arena_.take<T>(panels<T>(p.value_dim) * kPanel * longest);
    query_panels_ = arena_.take<T>(panels<T>(p.key_dim) * kPanel * kQueries);
    grad_queries_ = arena_.take<T>(panels<T>(p.key_dim) * kPanel * kQueries);
    grad_out_ = arena_.take<T>(p.value_dim * kQueries);
    grad_out_panels_ = arena_.take<T>(panels<T>(p.value_dim) * kPanel * kQueries);
    grads_ = arena_.take<T>(kQueries * kKeys);
    diagonal_sums_ = arena_.take<T>(longest + kQueries);
  }

  void forward(const Task& task) {
    begin(task);
    if (task.count <= kDirect) return forward_direct(task);
    pack_keys();
    const int64_t columns = panels<T>(p_.value_dim) * kPanel;
    gr::pack_columns(row_of(p_.v, p_.v_stride, p_.value_dim), p_.v_stride, length_, p_.value_dim, values_, length_);
    for (int64_t first = task.first; first < task.first + task.count; first += kQueries) {
      load_queries(task, first);
      std::fill_n(out_, columns * kQueries, T(0));
      for (int64_t key = 0; key < length_; key += kKeys) {
        if (!enter_tile(key)) continue;
        compute_scores(queries_, p_.key_dim, key_columns_, scores_);
        for (int64_t i = 0; i < tile_rows_; ++i) {
          for_segments(i, scores_, nullptr, [&](int64_t low, int64_t high) {
            prepare(i, low, high);
            activate<T>(high - low, T(p_.alpha), bias_, factor_, scores_ + i * kKeys + low);
          });
        }
        for_blocks([&](int64_t i, int64_t rows, int64_t low, int64_t high) {
          gr::add_product<T, false>(rows, scores_ + i * kKeys + low, kKeys, values_ + (tile_key_ + low) * kPanel,
                                    length_, high - low, out_ + i * kPanel, kQueries, p_.value_dim);
        });
      }
      for (int64_t i = 0; i < tile_rows_; ++i) {
        if (!p_.accumulate) std::fill_n(output_of(i), p_.value_dim, T(0));
        gr::add_unpacked(out_ + i * kPanel, kQueries, p_.value_dim, output_of(i));
      }
    }
  }

  void backward(const Task& task, const TableSums& sums) {
    begin(task);
    pack_keys();
    gr::pack_columns(row_of(p_.k, p_.k_stride, p_.key_dim), p_.k_stride, length_, p_.key_dim, keys_, length_);
    gr::pack_transposed(row_of(p_.v, p_.v_stride, p_.value_dim), p_.v_stride, length_, p_.value_dim, value_columns_);
    std::fill_n(grad_keys_, panels<T>(p_.key_dim) * kPanel * length_, T(0));
    std::fill_n(grad_values_, panels<T>(p_.value_dim) * kPanel * length_, T(0));
    for (int64_t first = 0; first < task.count; first += kQueries) {
      load_queries(task, first);
      const int64_t start = flat_[0];
      const T* grad_rows =
          static_cast<const T*>(p_.grad_out) + start * p_.grad_out_stride + head_ * p_.value_dim;
      for (int64_t i = 0; i < tile_rows_; ++i) {
        std::copy_n(grad_rows + i * p_.grad_out_stride, p_.value_dim, grad_out_ + i * p_.value_dim);
      }
      gr::pack_columns(queries_, p_.key_dim, tile_rows_, p_.key_dim, query_panels_, kQueries);
      gr::pack_columns(grad_out_, p_.value_dim, tile_rows_, p_.value_dim, grad_out_panels_, kQueries);
      std::fill_n(grad_queries_, panels<T>(p_.key_dim) * kPanel * kQueries, T(0));
      if (sums.position != nullptr) std::fill_n(diagonal_sums_, length_ + tile_rows_, T(0));
      for (int64_t key = 0; key < length_; key += kKeys) {
        if (enter_tile(key)) backward_tile(sums);
      }
      if (sums.position != nullptr) {
        double* target = sums.position + p_.max_seq_len - 1 - (position_[0] + tile_rows_ - 1);
        for (int64_t slot = 0; slot < length_ + tile_rows_ - 1; ++slot) target[slot] += diagonal_sums_[slot];
      }
      gr::unpack(grad_queries_, kQueries, tile_rows_, p_.key_dim, T(p_.alpha),
                 static_cast<T*>(p_.grad_q) + (start * p_.heads + head_) * p_.key_dim, p_.heads * p_.key_dim);
    }
    const int64_t first_row = p_.offsets[row_] * p_.heads + head_;
    gr::unpack(grad_keys_, length_, length_, p_.key_dim, T(p_.alpha),
               static_cast<T*>(p_.grad_k) + first_row * p_.key_dim, p_.heads * p_.key_dim);
    gr::unpack(grad_values_, length_, length_, p_.value_dim, T(1),
               static_cast<T*>(p_.grad_v) + first_row * p_.value_dim, p_.heads * p_.value_dim);
  }

 private:
  static constexpr int64_t kPanel = Simd<T>::kPanel;

  const T* row_of(const void* data, int64_t stride, int64_t dim) const {
    return static_cast<const T*>(data) + p_.offsets[row_] * stride + head_ * dim;
  }

  const T* table_of(const void* data, int64_t heads, int64_t length) const {
    return data == nullptr ? nullptr : static_cast<const T*>(data) + (heads > 1 ? head_ * length : 0);
  }

  void begin(const Task& task) {
    row_ = task.row;
    head_ = task.head;
    length_ = key_count(p_, row_);
    origin_ = p_.key_origins != nullptr ? p_.key_origins[row_] : 0;
    scale_ = p_.scales != nullptr ? static_cast<const T*>(p_.scales)[row_] : T(p_.scale);
    positions_table_ = table_of(p_.position_weights, p_.position_heads, 2 * p_.max_seq_len - 1);
    times_table_ = table_of(p_.time_weights, p_.time_heads, p_.num_buckets + 1);
    if (times_table_ != nullptr) begin_times(task);
  }

  void pack_keys() {
    gr::pack_transposed(row_of(p_.k, p_.k_stride, p_.key_dim), p_.k_stride, length_, p_.key_dim, key_columns_);
  }

  T* output_of(int64_t i) const { return static_cast<T*>(p_.out) + (flat_[i] * p_.heads + head_) * p_.value_dim; }

  // One dot product a score and one scaled row a key, straight from where keys and values lie.
  void forward_direct(const Task& task) {
    const T* keys = row_of(p_.k, p_.k_stride, p_.key_dim);
    const T* values = row_of(p_.v, p_.v_stride, p_.value_dim);
    load_queries(task, task.first);
    for (int64_t i = 0; i < tile_rows_ && !p_.accumulate; ++i) std::fill_n(output_of(i), p_.value_dim, T(0));
    for (int64_t key = 0; key < length_; key += kKeys) {
      if (!enter_tile(key)) continue;
      for (int64_t i = 0; i < tile_rows_; ++i) {
        const T* __restrict query = queries_ + i * p_.key_dim;
        T* __restrict out = output_of(i);
        for_segments(i, nullptr, nullptr, [&](int64_t low, int64_t high) {
          for (int64_t j = low; j < high; ++j) {
            const T* __restrict row = keys + (key + j) * p_.k_stride;
            T sum = T(0);
            for (int64_t d = 0; d < p_.key_dim; ++d) sum += query[d] * row[d];
            scores_[j] = sum;
          }
          prepare(i, low, high);
          activate<T>(high - low, T(p_.alpha), bias_, factor_, scores_ + low);
          for (int64_t j = low; j < high; ++j) {
            const T* __restrict row = values + (key + j) * p_.v_stride;
            const T weight = scores_[j];
            for (int64_t d = 0; d < p_.value_dim; ++d) out[d] += weight * row[d];
          }
        });
      }
    }
  }

  // Times of the row as 32-bit distances from its earliest, where all of them fit.
  void begin_times(const Task& task) {
    const int64_t *times = p_.key_times + p_.offsets[row_], *query_times = p_.query_times + first_query(p_, row_);
    int64_t low = query_times[task.first], high = low;
    for (int64_t j = 0; j < length_; ++j) {
      low = std::min(low, times[j]);
      high = std::max(high, times[j]);
    }
    for (int64_t i = task.first; i < task.first + task.count; ++i) {
      low = std::min(low, query_times[i]);
      high = std::max(high, query_times[i]);
    }
    earliest_ = low;
    times_are_small_ = static_cast<uint64_t>(high) - static_cast<uint64_t>(low) < INT32_MAX;
    if (!times_are_small_) return;
    for (int64_t j = 0; j < length_; ++j) times_[j] = static_cast<int32_t>(times[j] - low);
  }

  void load_queries(const Task& task, int64_t first) {
    const int64_t row_length = ::row_length(p_, row_), before = row_length - query_count(p_, row_);
    const Mask mask(p_, row_, row_length);
    tile_rows_ = std::min(kQueries, task.first + task.count - first);
    for (int64_t i = 0; i < tile_rows_; ++i) {
      flat_[i] = first_query(p_, row_) + first + i;
      position_[i] = before + first + i;
      span_[i] = among_keys(mask(position_[i]));
      const T* source = static_cast<const T*>(p_.q) + flat_[i] * p_.q_stride + head_ * p_.key_dim;
      std::copy_n(source, p_.key_dim, queries_ + i * p_.key_dim);
      if (p_.dropout) {
        const int64_t key = p_.row_keys != nullptr ? p_.row_keys[flat_[i]] : flat_[i];
        token_[i] = gr::token_hash(static_cast<uint64_t>(p_.dropout_seed), static_cast<uint64_t>(key));
      }
    }
  }

  // A span of positions as one of this row's keys, which start at position origin_.
  Span among_keys(Span span) const {
    const int64_t own = span.own - origin_;
    span.low = std::clamp<int64_t>(span.low - origin_, 0, length_);
    span.high = std::clamp<int64_t>(span.high - origin_, span.low, length_);
    span.own = span.own >= 0 && own >= 0 && own < length_ ? own : -1;
    return span;
  }

  // Which keys of [key, key + kKeys) each block of queries needs; false where none does.
  bool enter_tile(int64_t key) {
    tile_key_ = key;
    tile_keys_ = std::min(kKeys, length_ - key);
    bool any = false;
    for (int64_t i = 0; i < tile_rows_; i += kBlock) {
      int64_t low = tile_keys_, high = 0;
      for (int64_t r = i; r < std::min(i + kBlock, tile_rows_); ++r) {
        const Span& span = span_[r];
        const int64_t first = std::max(span.low, key) - key, last = std::min(span.high, key + tile_keys_) - key;
        if (first < last) {
          low = std::min(low, first);
          high = std::max(high, last);
        }
        if (span.own >= key && span.own < key + tile_keys_) {
          low = std::min(low, span.own - key);
          high = std::max(high, span.own - key + 1);
        }
      }
      block_low_[i / kBlock] = low;
      block_high_[i / kBlock] = high;
      any |= low < high;
    }
    return any;
  }

  // step(first query, queries, first key, end of keys) for each block of the tile that sees any key.
  template <class Step>
  void for_blocks(Step step) const {
    for (int64_t i = 0; i < tile_rows_; i += kBlock) {
      const int64_t low = block_low_[i / kBlock], high = block_high_[i / kBlock];
      if (low < high) step(i, std::min(kBlock, tile_rows_ - i), low, high);
    }
  }

  // to[query, key] = <left[query], columns[key]> for the whole panels that hold keys some query of the block sees.
  void compute_scores(const T* left, int64_t depth, const T* columns, T* to) const {
    for (int64_t first = 0; first < tile_keys_; first += kPanel) {
      const T* panel = columns + (tile_key_ + first) * depth;
      for_blocks([&](int64_t i, int64_t rows, int64_t low, int64_t high) {
        if (first + kPanel <= low || first >= high) return;
        gr::product<T, 2, false, false>(rows, left + i * depth, depth, panel, depth, to + i * kKeys + first, kKeys);
      });
    }
  }

  // step(low, high) for each range of keys that query i sees in the tile; the rest of the row becomes zero.
  template <class Step>
  void for_segments(int64_t i, T* scores, T* grads, Step step) const {
    const Span& span = span_[i];
    const int64_t own = span.own - tile_key_;
    const int64_t low = std::clamp<int64_t>(span.low - tile_key_, 0, tile_keys_);
    const int64_t high = std::clamp<int64_t>(span.high - tile_key_, low, tile_keys_);
    const bool has_own = span.own >= 0 && own >= 0 && own < tile_keys_;
    if (low < high) step(low, high);
    if (has_own) step(own, own + 1);
    for (T* tile : {scores, grads}) {
      if (tile == nullptr) continue;
      T* row = tile + i * kKeys;
      const T kept = has_own ? row[own] : T(0);
      std::fill(row, row + low, T(0));
      std::fill(row + high, row + tile_keys_, T(0));
      if (has_own) row[own] = kept;
    }
  }

  // Bias, buckets and factor of query i and keys [low, high) of the tile.
  void prepare(int64_t i, int64_t low, int64_t high) {
    const int64_t count = high - low, key = tile_key_ + low;
    if (positions_table_ != nullptr) {
      std::copy_n(positions_table_ + p_.max_seq_len - 1 + origin_ + key - position_[i], count, bias_);
    } else {
      std::fill_n(bias_, count, T(0));
    }
    if (times_table_ != nullptr) {
      const int64_t time = p_.query_times[flat_[i]];
      if (times_are_small_) {
        bucket_of_.small(static_cast<int32_t>(time - earliest_), times_ + key, count, bucket_);
      } else {
        const int64_t* times = p_.key_times + p_.offsets[row_] + key;
        for (int64_t j = 0; j < count; ++j) bucket_[j] = bucket_of_(time, times[j]);
      }
      add_looked_up(times_table_, bucket_, count, bias_);
    }
    if (p_.dropout) {
      const T kept = scale_ * T(p_.dropout_factor);
      const uint32_t lane = static_cast<uint32_t>(head_ * p_.max_seq_len + origin_ + key);
      const uint32_t threshold = static_cast<uint32_t>(p_.dropout_threshold), token = token_[i];
      for (int64_t j = 0; j < count; ++j) {
        factor_[j] = gr::dropped(token, lane + static_cast<uint32_t>(j), threshold) ? T(0) : kept;
      }
    } else {
      std::fill_n(factor_, count, scale_);
    }
  }

  void backward_tile(const TableSums& sums) {
    compute_scores(queries_, p_.key_dim, key_columns_, scores_);
    compute_scores(grad_out_, p_.value_dim, value_columns_, grads_);
    for (int64_t i = 0; i < tile_rows_; ++i) {
      for_segments(i, scores_, grads_, [&](int64_t low, int64_t high) {
        prepare(i, low, high);
        T* grads = grads_ + i * kKeys + low;
        activate_backward<T>(high - low, T(p_.alpha), bias_, factor_, scores_ + i * kKeys + low, grads);
        if (sums.position != nullptr) {
          T* target = diagonal_sums_ + tile_key_ + low + tile_rows_ - 1 - i;
          for (int64_t j = 0; j < high - low; ++j) target[j] += grads[j];
        }
        if (sums.time != nullptr) {
          for (int64_t j = 0; j < high - low; ++j) sums.time[bucket_[j] * kCopies + j % kCopies] += grads[j];
        }
      });
    }
    for_blocks([&](int64_t i, int64_t rows, int64_t low, int64_t high) {
      gr::add_product<T, false>(rows, grads_ + i * kKeys + low, kKeys, keys_ + (tile_key_ + low) * kPanel, length_,
                                high - low, grad_queries_ + i * kPanel, kQueries, p_.key_dim);
    });
    for (int64_t key = 0; key < tile_keys_; key += kBlock) {
      const int64_t keys = std::min(kBlock, tile_keys_ - key);
      int64_t low = tile_rows_, high = 0;
      for_blocks([&](int64_t i, int64_t rows, int64_t block_low, int64_t block_high) {
        if (block_low >= key + keys || block_high <= key) return;
        low = std::min(low, i);
        high = i + rows;
      });
      if (low >= high) continue;
      gr::add_product<T, true>(keys, scores_ + low * kKeys + key, kKeys, grad_out_panels_ + low * kPanel, kQueries,
                               high - low, grad_values_ + (tile_key_ + key) * kPanel, length_, p_.value_dim);
      gr::add_product<T, true>(keys, grads_ + low * kKeys + key, kKeys, query_panels_ + low * kPanel, kQueries,
                               high - low, grad_keys_ + (tile_key_ + key) * kPanel, length_, p_.key_dim);
    }
  }

  const Problem& p_;
  const Buckets& bucket_of_;
  Arena arena_;

  // The task.
  int64_t row_ = 0, head_ = 0, length_ = 0, origin_ = 0, earliest_ = 0;
  bool times_are_small_ = false;
  T scale_ = T(0);
  const T *positions_table_ = nullptr, *times_table_ = nullptr;
  T *key_columns_, *value_columns_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
  T *grad_keys_ = nullptr, *grad_values_ = nullptr;
  int32_t* times_;

  // The tile of queries, and of keys within it.
  int64_t tile_rows_ = 0, tile_key_ = 0, tile_keys_ = 0;
  int64_t flat_[kQueries], position_[kQueries];
  Span span_[kQueries];
  uint32_t token_[kQueries];
  int64_t block_low_[kQueries / kBlock], block_high_[kQueries / kBlock];
  T *queries_, *scores_, *bias_, *factor_;
  int32_t* bucket_;
  T *out_ = nullptr, *query_panels_ = nullptr, *grad_queries_ = nullptr, *grad_out_ = nullptr;
  T *grad_out_panels_ = nullptr, *grads_ = nullptr, *diagonal_sums_ = nullptr;
};

int64_t longest_row(const Problem& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) longest = std::max(longest, key_count(p, b));
  return longest;
}

Status check(const Problem& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.offsets[b + 1] < p.offsets[b]) return kBadOffsets;
    if (row_length(p, b) > p.max_seq_len) return kRowTooLong;
    if (query_count(p, b) < 0 || query_count(p, b) > row_length(p, b)) return kBadRows;
    if (key_count(p, b) < 0 || key_count(p, b) > p.offsets[b + 1] - p.offsets[b]) return kBadRows;
  }
  if (p.offsets[0] != 0 || p.offsets[p.batch] != p.total) return kBadOffsets;
  if (first_query(p, 0) != 0 || first_query(p, p.batch) != p.queries) return kBadRows;
  return kOk;
}

// Threads worth waking: one more for each stretch of work that takes longer than the waking.
int thread_count(const Problem& p, int64_t tasks) {
  constexpr int64_t kWorth = 1 << 19;
  int64_t pairs = 0;
  for (int64_t b = 0; b < p.batch; ++b) pairs += query_count(p, b) * key_count(p, b);
  const int64_t useful = 1 + pairs * p.heads * (p.key_dim + p.value_dim) / kWorth;
  return static_cast<int>(std::clamp<int64_t>(std::min(useful, tasks), 1, std::max<int64_t>(p.threads, 1)));
}

template <class T>
void forward(const Problem& p) {
  // Long rows are cut, so that a single one feeds every thread; packing its keys again is a small part of the work.
  constexpr int64_t kPiece = 8 * kQueries;
  const Buckets buckets(p.thresholds, p.num_buckets);
  std::vector<Task> tasks;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t count = query_count(p, b), length = key_count(p, b);
    const int64_t piece = count == 0 ? 1 : ceil_div(ceil_div(count, ceil_div(count, kPiece)), kQueries) * kQueries;
    for (int64_t first = 0; first < count; first += piece) {
      const int64_t size = std::min(piece, count - first);
      for (int64_t h = 0; h < p.heads; ++h) tasks.push_back({b, h, first, size, size * length});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  const int64_t count = static_cast<int64_t>(tasks.size()), longest = longest_row(p);
  const int threads = thread_count(p, count);
#pragma omp parallel num_threads(threads)
  {
    Worker<T> worker(p, buckets, longest, false);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < count; ++t) worker.forward(tasks[t]);
  }
}

// Adds the chunks' sums in their order; tables shared by the heads take those of every head.
template <class T>
void reduce(const Problem& p, const std::vector<double>& sums, int64_t chunk_size, int64_t groups) {
  const int64_t positions = 2 * p.max_seq_len - 1;
  std::vector<double> total;
  const auto add = [&](void* out, int64_t heads, int64_t length, int64_t start, int64_t copies) {
    if (out == nullptr) return;
    total.assign(heads * length, 0.0);
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t g = 0; g < groups; ++g) {
        const double* part = sums.data() + (h * groups + g) * chunk_size + start;
        double* target = total.data() + (heads > 1 ? h * length : 0);
        for (int64_t i = 0; i < length * copies; ++i) target[i / copies] += part[i];
      }
    }
    for (int64_t i = 0; i < heads * length; ++i) static_cast<T*>(out)[i] = static_cast<T>(total[i]);
  };
  add(p.grad_position, p.position_heads, positions, 0, 1);
  add(p.grad_time, p.time_heads, p.num_buckets + 1, p.grad_position != nullptr ? positions : 0, kCopies);
}

template <class T>
void backward(const Problem& p) {
  const Buckets buckets(p.thresholds, p.num_buckets);
  std::vector<int64_t> order(p.batch);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key_count(p, a) > key_count(p, b); });
  // Chunk (head, group) takes every groups-th row of the sorted order: equal work, and the longest rows first.
  const int64_t groups = std::max<int64_t>(1, std::min(p.batch, ceil_div(kChunks, p.heads)));
  const int64_t chunks = p.heads * groups;
  const int64_t positions = p.grad_position != nullptr ? 2 * p.max_seq_len - 1 : 0;
  const int64_t chunk_size = positions + (p.grad_time != nullptr ? (p.num_buckets + 1) * kCopies : 0);
  std::vector<double> sums(chunks * chunk_size);
  const int64_t longest = longest_row(p);
  const int threads = thread_count(p, chunks);
#pragma omp parallel num_threads(threads)
  {
    Worker<T> worker(p, buckets, longest, true);
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t head = c % p.heads, group = c / p.heads;
      double* own = sums.data() + (head * groups + group) * chunk_size;
      const TableSums tables{positions > 0 ? own : nullptr, p.grad_time != nullptr ? own + positions : nullptr};
      for (int64_t i = group; i < p.batch; i += groups) {
        const int64_t row = order[i], length = key_count(p, row);
        if (length > 0) worker.backward({row, head, 0, length, 0}, tables);
      }
    }
  }
  reduce<T>(p, sums, chunk_size, groups);
}

}  // namespace

// Both return a Status; is_double tells the type behind every void pointer of the problem.
GR_EXPORT int64_t hstu_attention_forward(const Problem* problem, int64_t is_double) {
  const Status status = check(*problem);
  if (status == kOk) is_double ? forward<double>(*problem) : forward<float>(*problem);
  return status;
}

GR_EXPORT int64_t hstu_attention_backward(const Problem* problem, int64_t is_double) {
  const Status status = check(*problem);
  if (status == kOk) is_double ? backward<double>(*problem) : backward<float>(*problem);
  return status;
}
