// Jagged rows on the CPU: a row is contiguous in memory, so each is one copy of bytes, whatever the type of its values.
//
// `width` is the bytes of one value. Every function returns whether the offsets are those of the tensors it is given,
// ascending from 0 to the number of values, and touches nothing where they are not.
#include <algorithm>
#include <cstdint>
#include <cstring>

#define GR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kParallelBytes = 1 << 16;

bool fit(const int64_t* offsets, int64_t rows, int64_t total) {
  return offsets[0] == 0 && offsets[rows] == total && std::is_sorted(offsets, offsets + rows + 1);
}

// `bytes`, a multiple of `item`, filled with copies of one item, doubling what is there.
void fill(char* to, int64_t bytes, const char* padding, int64_t item) {
  if (bytes == 0) return;
  std::memcpy(to, padding, item);
  for (int64_t done = item; done < bytes; done *= 2) std::memcpy(to + done, to, std::min(done, bytes - done));
}

}  // namespace

GR_EXPORT bool to_padded(const char* values, const int64_t* offsets, int64_t rows, int64_t total, int64_t max_len,
                         int64_t width, const char* padding, int64_t item, char* out) {
  if (!fit(offsets, rows, total)) return false;
#pragma omp parallel for schedule(static) if (rows * max_len * width > kParallelBytes)
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t filled = std::min(offsets[b + 1] - offsets[b], max_len) * width;
    char* row = out + b * max_len * width;
    if (filled > 0) std::memcpy(row, values + offsets[b] * width, filled);
    fill(row + filled, max_len * width - filled, padding, item);
  }
  return true;
}

GR_EXPORT bool to_jagged(const char* dense, const int64_t* offsets, int64_t rows, int64_t total, int64_t max_len,
                         int64_t width, char* out) {
  if (!fit(offsets, rows, total)) return false;
#pragma omp parallel for schedule(guided) if (total * width > kParallelBytes)
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t bytes = (offsets[b + 1] - offsets[b]) * width;
    const int64_t filled = std::min(bytes, max_len * width);
    char* row = out + offsets[b] * width;
    if (filled > 0) std::memcpy(row, dense + b * max_len * width, filled);
    if (bytes > filled) std::memset(row + filled, 0, bytes - filled);
  }
  return true;
}

// Between concatenated rows and their parts; a null part is left out. Values of row b's left part start at
// left[b] + right[b] in the whole, those of its right part at left[b + 1] + right[b].
GR_EXPORT bool move_parts(char* whole, char* left_values, char* right_values, const int64_t* left, const int64_t* right,
                          int64_t rows, int64_t left_total, int64_t right_total, int64_t width, bool to_whole) {
  if (!fit(left, rows, left_total) || !fit(right, rows, right_total)) return false;
  const auto copy = [=](char* part, int64_t place, int64_t begin, int64_t end) {
    if (part == nullptr || begin == end) return;
    char* there = whole + place * width;
    char* here = part + begin * width;
    std::memcpy(to_whole ? there : here, to_whole ? here : there, (end - begin) * width);
  };
#pragma omp parallel for schedule(guided) if ((left_total + right_total) * width > kParallelBytes)
  for (int64_t b = 0; b < rows; ++b) {
    copy(left_values, left[b] + right[b], left[b], left[b + 1]);
    copy(right_values, left[b + 1] + right[b], right[b], right[b + 1]);
  }
  return true;
}
