// The noise of csrc/math/philox.h, word by word: what its tests call.
#include "math/philox.h"

extern "C" {

void philox4x32(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const AdvflowPhilox random = advflow_philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  for (int i = 0; i < 4; ++i) out[i] = random.word[i];
}

// words[count][4] to out[count][4].
void normals(const uint32_t* words, int64_t count, float* out) {
  for (const uint32_t* end = words + 4 * count; words != end; words += 4, out += 4) {
    advflow_normals({{words[0], words[1], words[2], words[3]}}, out);
  }
}

}  // extern "C"
