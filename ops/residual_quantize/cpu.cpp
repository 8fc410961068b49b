// From the scores of a block of tokens to their codes and residuals.
#include <algorithm>
#include <limits>

#include "simd.h"

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using gr::Simd;

// Index of the first largest of `count` scores; NaN is smaller than all others, and 0 is the answer where none is above
// minus infinity.
template <class T>
int64_t first_largest(const T* scores, int64_t count) {
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  T largest = kLowest;
  int64_t i = 0;
  if (count >= 2 * kLanes) {
    typename Simd<T>::Vec even = kLowest - typename Simd<T>::Vec{}, odd = even;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      const typename Simd<T>::Vec a = gr::load(scores + i), b = gr::load(scores + i + kLanes);
      even = a > even ? a : even;
      odd = b > odd ? b : odd;
    }
    even = odd > even ? odd : even;
    for (int lane = 0; lane < kLanes; ++lane) largest = even[lane] > largest ? even[lane] : largest;
  }
  for (; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
  if (!(largest > kLowest)) return 0;

  constexpr int64_t kStep = 4 * kLanes;
  for (i = 0; i + kStep <= count; i += kStep) {
    int found = 0;
    for (int64_t j = 0; j < kStep; ++j) found |= scores[i + j] == largest;
    if (found) break;
  }
  while (scores[i] != largest) ++i;
  return i;
}

template <class T>
void take_nearest(const T* scores, const T* codebook, int64_t tokens, int64_t size, int64_t width, T* residual,
                  int64_t* codes) {
#pragma omp parallel for schedule(static) if (tokens * (size + width) > 16384)
  for (int64_t t = 0; t < tokens; ++t) {
    codes[t] = first_largest(scores + t * size, size);
    const T* chosen = codebook + codes[t] * width;
    T* left = residual + t * width;
    for (int64_t d = 0; d < width; ++d) left[d] -= chosen[d];
  }
}

}  // namespace

GR_EXPORT void take_nearest_f32(const float* scores, const float* codebook, int64_t tokens, int64_t size, int64_t width,
                                float* residual, int64_t* codes) {
  take_nearest(scores, codebook, tokens, size, width, residual, codes);
}

GR_EXPORT void take_nearest_f64(const double* scores, const double* codebook, int64_t tokens, int64_t size,
                                int64_t width, double* residual, int64_t* codes) {
  take_nearest(scores, codebook, tokens, size, width, residual, codes);
}
