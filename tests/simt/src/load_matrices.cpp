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

void store_matrices(const Lanes<StoreMatricesSlot>& lanes, const SharedMemory& shared, AsyncProxy& proxy, const Site& site) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
        for (int row = 0; row < rows; ++row) {
            std::byte* first = shared.at(lanes[matrix * rows + row].row_address, row_bytes, site);
            for (int i = 0; i < words_per_row; ++i) {
                const StoreMatricesSlot& writer = lanes[row * words_per_row + i];
                std::byte* place = first + i * sizeof(uint32_t);
                std::memcpy(place, &writer.words[matrix], sizeof(uint32_t));
                proxy.wrote(writer.thread, place, sizeof(uint32_t));
            }
        }
    }
}

}  // namespace simt
