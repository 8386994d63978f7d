// The epilogue of a tile of accumulators that passes through shared memory, slice by slice.
#pragma once

#include <cstdint>

#include <device/ptx.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>

#include "../conv_args.h"
#include "epilogue.cuh"
#include "residual.cuh"
#include "rows.cuh"

namespace fused_cna::kernels {

// A tile is Slices times Rows x Columns. Rows of a slice's accumulators lie Pitch floats apart. In a turn each thread
// finishes `width` neighbouring columns of one row.
template <int Rows, int Columns, int Pitch, int Threads, int Slices = 1>
struct TileShape {
    static constexpr int rows = Rows, columns = Columns, pitch = Pitch, threads = Threads, slices = Slices;
    static constexpr int width = columns % 8 == 0 ? 8 : 1, stores_per_row = columns / width;
    static constexpr int turns = (rows * stores_per_row + threads - 1) / threads;  // of a slice
    static constexpr bool is_whole = rows * stores_per_row == turns * threads;
    static_assert(threads % stores_per_row == 0 && threads % rows == 0, "a thread keeps its column or its row");
    static_assert(is_whole || turns == 1, "threads without work are those of an only turn");
};

// Where a block's columns lie among the output channels, and how many of them exist.
struct ColumnRange {
    int64_t first_channel;
    int count;
};

template <class T, class Shape>
class TileStore {
    static constexpr int width = Shape::width, all_rows = Shape::rows * Shape::slices,
                         all_turns = Shape::turns * Shape::slices;
    static constexpr int depth = all_turns >= 4 ? 4 : all_turns >= 2 ? 2 : 1;
    static constexpr bool has_queue = width % device::values_per_vector<T> == 0;
    using Queue = ResidualQueue<has_queue ? width : device::values_per_vector<T>, T, Shape::threads, depth>;

   public:
    using ResidualSlots = typename Queue::Slots;

    // `places` are those of the tile's rows, in the order in which the slices take them.
    __device__ TileStore(const ConvArgs& args, const RowPlace* places, const ChannelFold* folds, const ColumnRange& columns,
                         const ResidualSlots& slots)
        : args_(args), places_(places), folds_in_memory_(folds), columns_(columns), queue_(slots) {
        // Neighbouring threads write along whichever dimension of y is dense: channels, or else pixels.
        const bool channels_dense = args.y_strides.c == 1;
        const int thread = device::thread_x();
        first_row_ = channels_dense ? thread / Shape::stores_per_row : thread % Shape::rows;
        first_column_ = (channels_dense ? thread % Shape::stores_per_row : thread / Shape::rows) * width;
        row_step_ = channels_dense ? Shape::threads / Shape::stores_per_row : 0;
        column_step_ = channels_dense ? 0 : Shape::threads / Shape::rows * width;
        enter_column(first_column_);
        is_ahead_ = has_queue && channels_dense && residual_ && args.residual_strides.c == 1 && valid_ == width;
    }

    // Asks for the residual of the first turns, once the places are there.
    __device__ __forceinline__ void start() {
        if (!is_ahead_) return;
#pragma unroll
        for (int turn = 0; turn < depth; ++turn) ask(first_row_ + turn * row_step_);
    }

    // Finishes and stores a slice: a rolled loop, so that the activations are instantiated once.
    __device__ __forceinline__ void store(int slice, const float* accumulators) {
        int row = first_row_, column = first_column_;
#pragma unroll 1
        for (int i = 0; i < Shape::turns; ++i, row += row_step_, column += column_step_) {
            if (!Shape::is_whole && (row >= Shape::rows || column >= Shape::columns)) continue;
            if (column != folds_of_) {
                enter_column(column);
                load_folds(column);
            }
            finish(slice * Shape::rows + row, accumulators + row * Shape::pitch + column);
        }
    }

   private:
    __device__ __forceinline__ void enter_column(int column) {
        const int remaining = columns_.count - column;
        const int64_t channel = columns_.first_channel + column;
        valid_ = remaining < width ? remaining : width;
        y_ = static_cast<T*>(args_.y) + channel * args_.y_strides.c;
        residual_ = args_.residual ? static_cast<const T*>(args_.residual) + channel * args_.residual_strides.c : nullptr;
    }

    // Those of a thread mostly stay the same.
    __device__ __forceinline__ void load_folds(int column) {
#pragma unroll
        for (int j = 0; j < width; ++j) folds_[j] = folds_in_memory_[column + j];
        folds_of_ = column;
    }

    // Whether the queue can copy a row's residual.
    __device__ __forceinline__ bool takes_copy(const RowPlace& place) const {
        return place.exists() && device::is_aligned_16(residual_ + place.residual);
    }

    // Turns follow each other down the rows, through the slices.
    __device__ __forceinline__ void ask(int row) {
        const RowPlace place = row < all_rows ? places_[row] : RowPlace{-1, -1};
        queue_.ask(takes_copy(place), residual_ + place.residual);
    }

    __device__ __forceinline__ void take_residual(const RowPlace& place, float (&values)[width]) {
        bool is_copied = false;
        if constexpr (has_queue) {
            if (is_ahead_) {
                queue_.wait();
                is_copied = takes_copy(place);
                if (is_copied) queue_.take(values);
            }
        }
        if (is_copied) return;
#pragma unroll
        for (float& value : values) value = 0.0f;
        if (residual_ && place.exists()) {
            load_channels<width, T>({residual_ + place.residual, args_.residual_strides.c}, valid_, values);
        }
    }

    __device__ __forceinline__ void finish(int row, const float* staged) {
        float values[width], residual[width];
        if constexpr (width == 8 && Shape::pitch % 4 == 0) {
            device::load_vector(staged, values);
        } else {
#pragma unroll
            for (int j = 0; j < width; ++j) values[j] = staged[j];
        }
        const RowPlace place = places_[row];
        take_residual(place, residual);
        if (is_ahead_) ask(row + depth * row_step_);
        if (!place.exists() || valid_ <= 0) return;
        finish_channels<width, T>(values, folds_, valid_, residual, {y_ + place.y, args_.y_strides.c}, args_.epilogue);
    }

    const ConvArgs& args_;
    const RowPlace* places_;
    const ChannelFold* folds_in_memory_;
    ColumnRange columns_;
    Queue queue_;
    int first_row_, first_column_;  // of a slice, in the thread's first turn
    int row_step_, column_step_;    // from turn to turn
    bool is_ahead_;                 // whether turns go down the rows of a residual that the queue can copy

    // Of the column that the thread is at:
    int valid_;
    T* y_;               // as if the pixel's offset were 0
    const T* residual_;  // likewise; null where there is none
    int folds_of_ = -1;
    ChannelFold folds_[width];
};

}  // namespace fused_cna::kernels
