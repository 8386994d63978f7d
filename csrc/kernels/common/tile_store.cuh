// The epilogue of a tile of accumulators that goes through shared memory, slice by slice.
#pragma once

#include <bit>

#include <device/device.cuh>

#include "kernels/common/epilogue.cuh"
#include "kernels/common/residual.cuh"

namespace fused_cna {

// The tile is Slices times Rows x Columns; rows of a slice's accumulators are Pitch floats apart. In each turn a thread
// finishes `width` neighbouring columns of `rows_per_turn` rows, with one wait for memory and one set of branches for all.
template <int Rows, int Columns, int Pitch, int Threads, int Slices = 1, int MostRowsPerTurn = 1>
struct TileShape {
    static constexpr int rows = Rows, columns = Columns, pitch = Pitch, threads = Threads, slices = Slices;
    static constexpr int width = columns % 8 == 0 ? 8 : 1, stores_per_row = columns / width;
    static constexpr int stores = (rows * stores_per_row + threads - 1) / threads;  // of one thread, per slice
    static constexpr int rows_per_turn = width == 8 && stores % MostRowsPerTurn == 0 ? MostRowsPerTurn : 1;
    static constexpr bool is_whole = rows * stores_per_row == stores * threads;
    static_assert(threads % stores_per_row == 0 && threads % rows == 0, "a thread keeps its column or its row");
    static_assert(is_whole || stores == 1, "threads without work are those of an only store");
};

// A block's columns among the output channels, and how many of them exist.
struct ColumnRange {
    int64_t first_channel;
    int count;
};

template <class T, class Shape>
class TileStore {
    static constexpr int width = Shape::width, batch = Shape::rows_per_turn;
    static constexpr int all_rows = Shape::rows * Shape::slices, all_turns = Shape::stores / batch * Shape::slices;
    static constexpr int depth = std::bit_floor(static_cast<unsigned>(all_turns < 4 / batch ? all_turns : 4 / batch));
    static constexpr bool has_vectors = width % device::values_per_vector<T> == 0;
    using Queue = ResidualQueue<batch, has_vectors ? width : device::values_per_vector<T>, T, Shape::threads, depth>;

   public:
    using ResidualSlots = typename Queue::Slots;

    // `places` are those of the tile's rows, in slice order.
    __device__ TileStore(const ConvArgs& args, const RowPlace* places, const ChannelFold* folds, const ColumnRange& columns,
                         const ResidualSlots& slots)
        : args_(args),
          places_(places),
          folds_in_memory_(folds),
          columns_(columns),
          queue_(slots),
          goes_down_(args.y_strides.c == 1) {
        const int thread = device::thread_x();
        first_row_ = goes_down_ ? thread / Shape::stores_per_row : thread % threads_per_column;
        first_column_ = (goes_down_ ? thread % Shape::stores_per_row : thread / threads_per_column) * width;
        next_row_ = goes_down_ ? rows_apart : threads_per_column;
        enter_column(first_column_);
        is_ahead_ = has_vectors && goes_down_ && args.residual_keeps_alignment && valid_ == width &&
                    device::is_aligned_16(residual_);
    }

    // Starts the copies of the first turns' residual. `places` must be complete.
    __device__ __forceinline__ void start() {
        if (!is_ahead_) return;
#pragma unroll
        for (int turn = 0; turn < depth; ++turn) ask(first_row_ + turn * batch * rows_apart);
    }

    // The same within the open group of copies, which the caller must wait for before the first slice.
    __device__ __forceinline__ void start_in_open_group() {
        if (!is_ahead_) return;
#pragma unroll
        for (int turn = 0; turn < depth; ++turn) ask_turn(first_row_ + turn * batch * rows_apart);
    }

    // Finishes and stores a slice: a rolled loop, so that the activations are instantiated once.
    __device__ __forceinline__ void store(int slice, const float* accumulators) {
        // A thread whose columns do not exist has zeros, on which SiLU takes the division's slow path: measured as 20 % of a
        // layer's time.
        if (goes_down_ && valid_ <= 0) return;
        if (slice == 0 && goes_down_) load_folds(first_column_);
        int row = first_row_, column = first_column_;
        const int row_step = goes_down_ ? batch * rows_apart : 0;
        const int column_step = goes_down_ ? 0 : Shape::threads / threads_per_column * width;
#pragma unroll 1
        for (int i = 0; i < Shape::stores / batch; ++i, row += row_step, column += column_step) {
            if (!Shape::is_whole && (row >= Shape::rows || column >= Shape::columns)) continue;
            if (!goes_down_) {
                enter_column(column);
                if (valid_ <= 0) return;
                load_folds(column);
            }
            finish(slice * Shape::rows + row, accumulators + row * Shape::pitch + column);
        }
    }

   private:
    // Rows between the rows of a thread that goes down a column; number of threads that share a column when threads go along
    // rows.
    static constexpr int rows_apart = Shape::threads / Shape::stores_per_row, threads_per_column = Shape::rows / batch;
    static_assert(Shape::rows % batch == 0, "rows are finished in batches");

    __device__ __forceinline__ void enter_column(int column) {
        const int remaining = columns_.count - column;
        const int64_t channel = columns_.first_channel + column;
        valid_ = remaining < width ? remaining : width;
        y_ = static_cast<T*>(args_.y) + channel * args_.y_strides.c;
        residual_ = args_.residual ? static_cast<const T*>(args_.residual) + channel * args_.residual_strides.c : nullptr;
    }

    __device__ __forceinline__ void load_folds(int column) {
#pragma unroll
        for (int j = 0; j < width; ++j) folds_[j] = folds_in_memory_[column + j];
    }

    // Turns go down the rows, through all slices.
    __device__ __forceinline__ void ask(int row) {
        ask_turn(row);
        device::commit_copies();
    }

    __device__ __forceinline__ void ask_turn(int row) {
#pragma unroll
        for (int b = 0; b < batch; ++b) {
            const int each = row + b * rows_apart;
            const RowPlace place = each < all_rows ? places_[each] : RowPlace{-1, -1};
            if (place.exists()) queue_.ask(b, residual_ + place.residual);
        }
        queue_.end_turn();
    }

    __device__ __forceinline__ void take_residual(const RowPlace (&places)[batch],
                                                  device::Packed<batch * width, T>& values) {
        if constexpr (has_vectors) {
            if (is_ahead_) return queue_.take(values);
        }
        Channels<batch, const T> source{{}, args_.residual_strides.c, valid_};
#pragma unroll
        for (int b = 0; b < batch; ++b) source.pixels[b] = {residual_ + places[b].residual, places[b].exists()};
        load_channels<width, batch, T>(source, values);
    }

    __device__ __forceinline__ void finish(int row, const float* staged) {
        float values[batch * width];
        RowPlace places[batch];
#pragma unroll
        for (int b = 0; b < batch; ++b) {
            load_staged(staged + b * next_row_ * Shape::pitch, values + b * width);
            places[b] = places_[row + b * next_row_];
        }
        const bool has_residual = args_.residual != nullptr;
        device::Packed<batch * width, T> residual;
        if (has_residual) take_residual(places, residual);
        finish_values<batch, width, T>(values, folds_, has_residual, residual, args_.epilogue);
        if (has_residual && is_ahead_) ask(row + depth * batch * rows_apart);
        Channels<batch, T> y{{}, args_.y_strides.c, valid_};
#pragma unroll
        for (int b = 0; b < batch; ++b) y.pixels[b] = {y_ + places[b].y, places[b].exists()};
        store_channels<width, batch, T>(y, values);
    }

    static __device__ __forceinline__ void load_staged(const float* staged, float* values) {
        float row[width];
        if constexpr (width == 8 && Shape::pitch % 4 == 0) {
            device::load_vector(staged, row);
        } else {
#pragma unroll
            for (int j = 0; j < width; ++j) row[j] = staged[j];
        }
#pragma unroll
        for (int j = 0; j < width; ++j) values[j] = row[j];
    }

    const ConvArgs& args_;
    const RowPlace* places_;
    const ChannelFold* folds_in_memory_;
    ColumnRange columns_;
    Queue queue_;
    // Neighbouring threads write along the dense dimension of y: channels, where each thread goes down the rows of its
    // columns, or pixels, where each goes along its row.
    const bool goes_down_;
    int first_row_, first_column_;  // in a slice, at the thread's first turn
    int next_row_;                  // from one row of a turn to the next
    bool is_ahead_;                 // whether the queue copies the residual: all of the thread's channels are whole vectors

    // For the thread's current columns:
    int valid_;
    T* y_;               // as if the pixel's offset were 0
    const T* residual_;  // likewise; null where there is none
    ChannelFold folds_[width];
};

}  // namespace fused_cna
