#include <cstring>

#include <simt/load_matrices.h>

namespace simt {

namespace { constexpr int matrices = 4, rows = 8, words_per_row = 4, row_bytes = 16; }  // namespace

void load_matrices(const Lanes<LoadMatricesSlot>& lanes, const SharedMemory& shared, const Site& site) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
        for (int row = 0; row < rows; ++row) {
            uint32_t words[words_per_row];
            std::memcpy(words, shared.at(lanes[matrix * rows + row].row_address, row_bytes, site), row_bytes);
            for (int i = 0; i < words_per_row; ++i) lanes[row * words_per_row + i].words[matrix] = words[i];
        }
    }
}

}  // namespace simt
