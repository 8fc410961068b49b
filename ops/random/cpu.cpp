// Uniform integers from counter-based bits; see ops/random/__init__.py for the formula.
#include "counter_random.h"

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kOneLaneHigh = int64_t{1} << 24;

}  // namespace

// out (T, R) row-major; 1 <= high <= 2^31.
GR_EXPORT void uniform_ints(uint64_t seed, const int64_t* keys, int64_t tokens, int64_t count, uint64_t high,
                            int64_t* out) {
  const bool one_lane = high <= static_cast<uint64_t>(kOneLaneHigh);
#pragma omp parallel for schedule(static) if (tokens * count > 4096)
  for (int64_t t = 0; t < tokens; ++t) {
    const uint32_t token = gr::token_hash(seed, static_cast<uint64_t>(keys[t]));
    int64_t* row = out + t * count;
    const uint32_t lanes = static_cast<uint32_t>(count);
    if (one_lane) {
      for (uint32_t r = 0; r < lanes; ++r) row[r] = (gr::lane_bits(token, r) * high) >> 32;
    } else {
      for (uint32_t r = 0; r < lanes; ++r) {
        const uint64_t upper = gr::lane_bits(token, 2 * r);
        const uint64_t lower = gr::lane_bits(token, 2 * r + 1);
        row[r] = (upper * high + ((lower * high) >> 32)) >> 32;
      }
    }
  }
}
