// Counter-based dropout: one pass, the mask computed in registers.
#include "counter_random.h"

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <class T>
void dropout(const T* x, const int64_t* keys, int64_t tokens, int64_t width, uint64_t seed, uint32_t threshold, T scale,
             T* out) {
#pragma omp parallel for schedule(static) if (tokens * width > 16384)
  for (int64_t t = 0; t < tokens; ++t) {
    const uint32_t token = gr::token_hash(seed, static_cast<uint64_t>(keys[t]));
    const T* from = x + t * width;
    T* to = out + t * width;
    for (uint32_t d = 0; d < static_cast<uint32_t>(width); ++d) {
      const T kept = from[d] * scale;
      to[d] = gr::dropped(token, d, threshold) ? T(0) : kept;
    }
  }
}

}  // namespace

GR_EXPORT void dropout_f32(const float* x, const int64_t* keys, int64_t tokens, int64_t width, uint64_t seed,
                           uint32_t threshold, double scale, float* out) {
  dropout(x, keys, tokens, width, seed, threshold, static_cast<float>(scale), out);
}

GR_EXPORT void dropout_f64(const double* x, const int64_t* keys, int64_t tokens, int64_t width, uint64_t seed,
                           uint32_t threshold, double scale, double* out) {
  dropout(x, keys, tokens, width, seed, threshold, scale, out);
}
