// Norm, gate and dropout of a token at a time, whose few rows stay in the first cache; formulas in __init__.py.
//
// Gradients of weight and bias are summed over fixed chunks of tokens and then over the chunks, so they do not depend
// on the number of threads.
#include <algorithm>
#include <cmath>

#include "counter_random.h"
#include "simd.h"

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Tokens summed into one row of partial sums.
constexpr int64_t kChunk = 128;

// In the order of ACTIVATIONS and SEGMENTS in form.py.
enum Activation : int64_t { kNone, kSilu, kSigmoid };
enum Output : int64_t { kProduct, kConcatNormed, kConcatRaw };

// `_Problem` of cpu.py.
struct Problem {
  const void* y;        // (tokens, groups * group_width), rows y_stride apart
  const void* u;        // likewise, u_stride apart
  const void* weight;   // (groups * group_width) or null
  const void* bias;     // likewise
  const int64_t* keys;  // (tokens), null without dropout
  int64_t y_stride, u_stride, tokens, groups, group_width;
  Activation activation;
  Output output;
  uint64_t seed;
  uint32_t threshold;
  double scale, eps;

  int64_t width() const { return groups * group_width; }
  int64_t out_width() const { return output == kProduct ? width() : 3 * width(); }
};

// One token of the problem, with scratch rows of `width` elements.
template <class T>
class Token {
 public:
  explicit Token(const Problem& p)
      : p_(p), width_(p.width()), stride_(gr::padded<T>(width_)), scratch_(gr::allocate<T>(kScratchRows * stride_)) {}

  void forward(int64_t t, T* out) {
    read(t);
    normalize();
    activate();
    T* product = row(kGated);
    for (int64_t d = 0; d < width_; ++d) product[d] = activated_[d] * normed_[d];
    if (p_.output == kProduct) {
      drop(product, 0, out);
    } else {
      drop(u_, 0, out);
      drop(p_.output == kConcatNormed ? normed_ : y_, 1, out + width_);
      drop(product, 2, out + 2 * width_);
    }
  }

  // Writes the gradients of y and u, and adds to the sums that are not null.
  void backward(int64_t t, const T* grad, T* grad_y, T* grad_u, T* weight_sum, T* bias_sum) {
    read(t);
    normalize();
    activate();
    const bool concatenated = p_.output != kProduct;
    T* grad_product = row(kGradProduct);
    T* grad_middle = row(kGradMiddle);
    T* grad_normed = row(kGradNormed);
    drop(grad + (concatenated ? 2 * width_ : 0), concatenated ? 2 : 0, grad_product);
    if (concatenated) {
      drop(grad, 0, grad_u);
      drop(grad + width_, 1, grad_middle);
    } else {
      std::fill(grad_u, grad_u + width_, T(0));
    }
    const T* slope = row(kSlope);
    for (int64_t d = 0; d < width_; ++d) {
      grad_u[d] += grad_product[d] * slope[d] * normed_[d];
      grad_normed[d] = grad_product[d] * activated_[d];
    }
    if (p_.output == kConcatNormed) {
      for (int64_t d = 0; d < width_; ++d) grad_normed[d] += grad_middle[d];
    }
    const T* standardized = row(kStandardized);
    if (weight_sum != nullptr) {
      for (int64_t d = 0; d < width_; ++d) weight_sum[d] += grad_normed[d] * standardized[d];
    }
    if (bias_sum != nullptr) {
      for (int64_t d = 0; d < width_; ++d) bias_sum[d] += grad_normed[d];
    }
    const T* weight = static_cast<const T*>(p_.weight);
    if (weight != nullptr) {
      for (int64_t d = 0; d < width_; ++d) grad_normed[d] *= weight[d];
    }
    const T* inverse = row(kInverse);
    for (int64_t first = 0; first < width_; first += p_.group_width) {
      group_backward(grad_normed + first, standardized + first, inverse[first], grad_y + first);
    }
    if (p_.output == kConcatRaw) {
      for (int64_t d = 0; d < width_; ++d) grad_y[d] += grad_middle[d];
    }
  }

 private:
  enum Row {
    kStandardized,
    kInverse,
    kNormed,
    kActivated,
    kSlope,
    kGated,
    kGradProduct,
    kGradMiddle,
    kGradNormed,
    kScratchRows
  };

  T* row(Row which) { return scratch_.get() + which * stride_; }

  void read(int64_t t) {
    y_ = static_cast<const T*>(p_.y) + t * p_.y_stride;
    u_ = static_cast<const T*>(p_.u) + t * p_.u_stride;
    if (p_.keys != nullptr) token_ = gr::token_hash(p_.seed, static_cast<uint64_t>(p_.keys[t]));
  }

  // Row kStandardized, each group's 1 / deviation at its first place of row kInverse, and normed_.
  void normalize() {
    T* standardized = row(kStandardized);
    T* inverse = row(kInverse);
    const T count = static_cast<T>(p_.group_width);
    for (int64_t first = 0; first < width_; first += p_.group_width) {
      const T* from = y_ + first;
      T* to = standardized + first;
      T total = 0;
      for (int64_t d = 0; d < p_.group_width; ++d) total += from[d];
      const T mean = total / count;
      T squares = 0;
      for (int64_t d = 0; d < p_.group_width; ++d) {
        to[d] = from[d] - mean;
        squares += to[d] * to[d];
      }
      const T scale = T(1) / std::sqrt(squares / count + static_cast<T>(p_.eps));
      for (int64_t d = 0; d < p_.group_width; ++d) to[d] *= scale;
      inverse[first] = scale;
    }
    const T* weight = static_cast<const T*>(p_.weight);
    const T* bias = static_cast<const T*>(p_.bias);
    normed_ = standardized;
    if (weight == nullptr && bias == nullptr) return;
    T* normed = row(kNormed);
    for (int64_t d = 0; d < width_; ++d) normed[d] = weight != nullptr ? standardized[d] * weight[d] : standardized[d];
    if (bias != nullptr) {
      for (int64_t d = 0; d < width_; ++d) normed[d] += bias[d];
    }
    normed_ = normed;
  }

  // activated_, and the activation's derivative in row kSlope.
  void activate() {
    T* slope = row(kSlope);
    T* activated = row(kActivated);
    activated_ = activated;
    if (p_.activation == kNone) {
      activated_ = u_;
      std::fill(slope, slope + width_, T(1));
    } else if (p_.activation == kSilu) {
      for (int64_t d = 0; d < width_; ++d) {
        // Below -87 SiLU is nothing, but the exponential, which ends at 88, would say otherwise of -1e38.
        const T u = u_[d] < T(-87) ? T(-87) : u_[d];
        const T gate = T(1) / (T(1) + gr::fast_exp(-u));
        activated[d] = u * gate;
        slope[d] = gate * (T(1) + u * (T(1) - gate));
      }
    } else {
      for (int64_t d = 0; d < width_; ++d) {
        const T gate = T(1) / (T(1) + gr::fast_exp(-u_[d]));
        activated[d] = gate;
        slope[d] = gate * (T(1) - gate);
      }
    }
  }

  // Dropout of one segment of the result, and its own gradient.
  void drop(const T* from, uint32_t segment, T* to) const {
    if (p_.keys == nullptr) {
      std::copy(from, from + width_, to);
      return;
    }
    const T scale = static_cast<T>(p_.scale);
    const uint32_t count = static_cast<uint32_t>(width_), first = segment * count;
    for (uint32_t d = 0; d < count; ++d) {
      const T kept = from[d] * scale;
      to[d] = gr::dropped(token_, first + d, p_.threshold) ? T(0) : kept;
    }
  }

  void group_backward(const T* grad, const T* standardized, T inverse, T* grad_y) const {
    T total = 0, along = 0;
    for (int64_t d = 0; d < p_.group_width; ++d) {
      total += grad[d];
      along += grad[d] * standardized[d];
    }
    total /= static_cast<T>(p_.group_width);
    along /= static_cast<T>(p_.group_width);
    for (int64_t d = 0; d < p_.group_width; ++d) grad_y[d] = inverse * (grad[d] - total - standardized[d] * along);
  }

  const Problem& p_;
  int64_t width_, stride_;
  gr::Buffer<T> scratch_;
  const T* y_ = nullptr;
  const T* u_ = nullptr;
  const T* normed_ = nullptr;
  const T* activated_ = nullptr;
  uint32_t token_ = 0;
};

template <class T>
void forward(const Problem& p, T* out) {
  const int64_t out_width = p.out_width();
#pragma omp parallel if (p.tokens * out_width > 16384)
  {
    Token<T> token(p);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.tokens; ++t) token.forward(t, out + t * out_width);
  }
}

// out[d] = sum over chunks of rows[chunk, d]; nothing where out is null.
template <class T>
void sum_rows(const T* rows, int64_t chunks, int64_t width, T* out) {
  if (out == nullptr) return;
  auto totals = gr::allocate<double>(width);
  std::fill(totals.get(), totals.get() + width, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t d = 0; d < width; ++d) totals[d] += rows[chunk * width + d];
  }
  for (int64_t d = 0; d < width; ++d) out[d] = static_cast<T>(totals[d]);
}

template <class T>
void backward(const Problem& p, const T* grad, int64_t grad_stride, T* grad_y, T* grad_u, T* grad_weight,
              T* grad_bias) {
  const int64_t width = p.width(), chunks = (p.tokens + kChunk - 1) / kChunk;
  auto weight_sums = gr::allocate<T>(grad_weight ? chunks * width : 0);
  auto bias_sums = gr::allocate<T>(grad_bias ? chunks * width : 0);
#pragma omp parallel if (p.tokens * width > 16384)
  {
    Token<T> token(p);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      T* weight_sum = grad_weight ? weight_sums.get() + chunk * width : nullptr;
      T* bias_sum = grad_bias ? bias_sums.get() + chunk * width : nullptr;
      if (weight_sum) std::fill(weight_sum, weight_sum + width, T(0));
      if (bias_sum) std::fill(bias_sum, bias_sum + width, T(0));
      for (int64_t t = chunk * kChunk; t < std::min((chunk + 1) * kChunk, p.tokens); ++t) {
        token.backward(t, grad + t * grad_stride, grad_y + t * width, grad_u + t * width, weight_sum, bias_sum);
      }
    }
  }
  sum_rows(weight_sums.get(), chunks, width, grad_weight);
  sum_rows(bias_sums.get(), chunks, width, grad_bias);
}

}  // namespace

GR_EXPORT void forward_f32(const Problem* p, float* out) { forward(*p, out); }
GR_EXPORT void forward_f64(const Problem* p, double* out) { forward(*p, out); }
GR_EXPORT void backward_f32(const Problem* p, const float* grad, int64_t grad_stride, float* grad_y, float* grad_u,
                            float* grad_weight, float* grad_bias) {
  backward(*p, grad, grad_stride, grad_y, grad_u, grad_weight, grad_bias);
}
GR_EXPORT void backward_f64(const Problem* p, const double* grad, int64_t grad_stride, double* grad_y, double* grad_u,
                            double* grad_weight, double* grad_bias) {
  backward(*p, grad, grad_stride, grad_y, grad_u, grad_weight, grad_bias);
}
