// The k best legal children of a request's beams, of which only those that may be among them are held.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "simd.h"

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Normalization { kNone, kVocabulary, kLegal };

// Children that are looked at together.
constexpr int64_t kBlock = 64;

// A candidate as one unsigned integer that is larger where the score is higher or, of equal scores, the child comes
// first: the score's bits, turned so that they ascend, above the inverted number of the child.
template <class T>
struct Packed;
template <>
struct Packed<float> {
  typedef uint32_t Bits;
  typedef uint64_t Key;
};
template <>
struct Packed<double> {
  typedef uint64_t Bits;
  typedef unsigned __int128 Key;
};

template <class T>
typename Packed<T>::Key pack(T score, uint32_t child) {
  typedef typename Packed<T>::Bits Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  Bits bits;
  std::memcpy(&bits, &score, sizeof(bits));
  if (bits == kSign) bits = 0;
  bits = bits & kSign ? ~bits : bits | kSign;
  return typename Packed<T>::Key(bits) << 32 | uint32_t(~child);
}

template <class T>
T score_of(typename Packed<T>::Key key) {
  typedef typename Packed<T>::Bits Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  Bits bits = Bits(key >> 32);
  bits = bits & kSign ? bits ^ kSign : ~bits;
  T score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// The best `wanted` of the candidates seen so far, and up to twice as many that may turn out to be.
template <class T>
class Best {
 public:
  typedef typename Packed<T>::Key Key;

  explicit Best(int64_t wanted) : wanted_(wanted) {}

  // What a further child must exceed: children come in the order that decides between equal scores.
  T threshold() const { return threshold_; }

  void add(T score, uint32_t child) {
    keys_.push_back(pack(score, child));
    if (static_cast<int64_t>(keys_.size()) >= 2 * wanted_ + 4 * kBlock) shrink();
  }

  // Best first, `wanted` at most.
  const std::vector<Key>& sorted() {
    if (static_cast<int64_t>(keys_.size()) > wanted_) shrink();
    std::sort(keys_.begin(), keys_.end(), std::greater<Key>());
    return keys_;
  }

 private:
  void shrink() {
    std::nth_element(keys_.begin(), keys_.begin() + (wanted_ - 1), keys_.end(), std::greater<Key>());
    keys_.resize(wanted_);
    threshold_ = score_of<T>(keys_.back());
  }

  int64_t wanted_;
  T threshold_ = -std::numeric_limits<T>::infinity();
  std::vector<Key> keys_;
};

// log(sum(exp(values))) in two parts, the largest value and the rest.
template <class T>
void log_sum_exp(const T* values, int64_t count, T* largest, T* rest) {
  const T top = gr::maximum(values, count);
  T total = 0;
  for (int64_t i = 0; i < count; ++i) total += gr::fast_exp(values[i] - top);
  *largest = top;
  *rest = std::log(total);
}

template <class T>
struct Level {
  const int32_t* offsets;
  const int32_t* tokens;
  const bool* allowed;
  int64_t beams, codes, beam_stride;
  Normalization normalization;
};

template <class T>
class Search {
 public:
  Search(const Level<T>& level, int64_t k)
      : level_(level), k_(k), best_(k + 1), first_(level.beams), begin_(level.beams + 1), legal_(level.codes) {}

  void run(const T* logits, const int64_t* states, const T* scores) {
    // All ranges before the first child is read, so that they are fetched from memory at once.
    uint32_t total = 0;
    for (int64_t m = 0; m < level_.beams; ++m) {
      const bool alive = states[m] >= 0 && scores[m] > -std::numeric_limits<T>::infinity();
      first_[m] = alive ? level_.offsets[states[m]] : 0;
      begin_[m] = total;
      total += alive ? level_.offsets[states[m] + 1] - first_[m] : 0;
      __builtin_prefetch(level_.tokens + first_[m]);
    }
    begin_[level_.beams] = total;
    for (int64_t m = 0; m < level_.beams; ++m) {
      if (begin_[m + 1] > begin_[m]) visit(m, logits + m * level_.beam_stride, scores[m]);
    }
  }

  void write(T* scores, int64_t* parents, int64_t* tokens, int64_t* states, int64_t* count, T* pruned) {
    const auto& keys = best_.sorted();
    const int64_t found = keys.size();
    *count = std::min(found, k_);
    *pruned = found > k_ ? score_of<T>(keys[k_]) : -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < *count; ++i) {
      const uint32_t child = ~uint32_t(keys[i]);
      const int64_t m = std::upper_bound(begin_.begin(), begin_.end(), child) - begin_.begin() - 1;
      const int64_t node = first_[m] + int64_t(child - begin_[m]);
      scores[i] = score_of<T>(keys[i]);
      parents[i] = m;
      tokens[i] = level_.tokens[node];
      states[i] = node;
    }
    std::fill(scores + *count, scores + k_, -std::numeric_limits<T>::infinity());
    for (int64_t* out : {parents, tokens, states}) std::fill(out + *count, out + k_, -1);
  }

 private:
  void visit(int64_t m, const T* logits, T score) {
    const int64_t count = begin_[m + 1] - begin_[m];
    const int32_t* tokens = level_.tokens + first_[m];
    const bool* allowed = level_.allowed ? level_.allowed + first_[m] : nullptr;
    T largest = 0, rest = 0;
    if (level_.normalization == kVocabulary) log_sum_exp(logits, level_.codes, &largest, &rest);
    if (level_.normalization == kLegal) {
      int64_t legal = 0;
      for (int64_t i = 0; i < count; ++i) {
        legal_[legal] = logits[tokens[i]];
        legal += !allowed || allowed[i];
      }
      if (legal == 0) return;
      log_sum_exp(legal_.data(), legal, &largest, &rest);
    }
    T values[kBlock];
    for (int64_t start = 0; start < count; start += kBlock) {
      const int64_t size = std::min(kBlock, count - start);
      // Differences to the largest are written out first: folded into one constant, a large logit's digits are lost.
      for (int64_t i = 0; i < size; ++i) values[i] = logits[tokens[start + i]] - largest;
      add(values, size, score - rest, begin_[m] + start, allowed ? allowed + start : nullptr);
    }
  }

  __attribute__((noinline)) void add(T* values, int64_t size, T shift, uint32_t child, const bool* allowed) {
    const T threshold = best_.threshold();
    int above = 0;
    for (int64_t i = 0; i < size; ++i) {
      values[i] += shift;
      above |= values[i] > threshold;
    }
    if (!above) return;
    for (int64_t i = 0; i < size; ++i) {
      if (values[i] > best_.threshold() && (!allowed || allowed[i])) best_.add(values[i], child + i);
    }
  }

  const Level<T>& level_;
  int64_t k_;
  Best<T> best_;
  // First child of each beam, and how many children the beams before it have.
  std::vector<int32_t> first_;
  std::vector<uint32_t> begin_;
  std::vector<T> legal_;
};

template <class T>
int64_t trie_step(const T* logits, const int64_t* states, const T* scores, const int32_t* offsets,
                  const int32_t* tokens, const bool* allowed, int64_t batch, int64_t beams, int64_t codes,
                  int64_t request_stride, int64_t beam_stride, int64_t state_count, int64_t allowed_stride, int64_t k,
                  int normalization, T* out_scores, T* out_pruned, int64_t* out_parents, int64_t* out_tokens,
                  int64_t* out_states, int64_t* out_count) {
  for (int64_t i = 0; i < batch * beams; ++i) {
    if (states[i] >= state_count) return states[i];
  }
#pragma omp parallel for schedule(dynamic) if (batch > 1)
  for (int64_t b = 0; b < batch; ++b) {
    const bool* own = allowed ? allowed + b * allowed_stride : nullptr;
    const Level<T> level{offsets, tokens, own, beams, codes, beam_stride, static_cast<Normalization>(normalization)};
    Search<T> search(level, k);
    search.run(logits + b * request_stride, states + b * beams, scores + b * beams);
    search.write(out_scores + b * k, out_parents + b * k, out_tokens + b * k, out_states + b * k, out_count + b,
                 out_pruned + b);
  }
  return -1;
}

}  // namespace

#define GR_TRIE_STEP(NAME, T)                                                                                          \
  GR_EXPORT int64_t NAME(const T* logits, const int64_t* states, const T* scores, const int32_t* offsets,              \
                         const int32_t* tokens, const bool* allowed, int64_t batch, int64_t beams, int64_t codes,      \
                         int64_t request_stride, int64_t beam_stride, int64_t state_count, int64_t allowed_stride,     \
                         int64_t k, int normalization, T* out_scores, T* out_pruned, int64_t* out_parents,             \
                         int64_t* out_tokens, int64_t* out_states, int64_t* out_count) {                               \
    return trie_step(logits, states, scores, offsets, tokens, allowed, batch, beams, codes, request_stride,            \
                     beam_stride, state_count, allowed_stride, k, normalization, out_scores, out_pruned, out_parents,  \
                     out_tokens, out_states, out_count);                                                               \
  }

GR_TRIE_STEP(trie_step_f32, float)
GR_TRIE_STEP(trie_step_f64, double)
