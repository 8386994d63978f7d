// The epilogue of a warpgroup's tile: fold, residual and activation in the registers that hold the sums. Residual and output
// go through shared memory; the residual is loaded there during the main loop.
#pragma once

#include "kernels/common/epilogue.cuh"
#include "kernels/implicit_gemm_sm90/shared.cuh"

namespace fused_cna::implicit_gemm_sm90 {

// A consumer warpgroup, as seen by one of its threads.
struct Group {
    int index, thread, warp, lane;

    static __device__ Group of(int index) {
        const int thread = device::thread_x() % 128;
        return {index, thread, thread / 32, thread % 32};
    }
    __device__ void sync() const { device::named_barrier(1 + index, 128); }
    __device__ bool leads() const { return thread == 0; }
};

// The output's shared memory: slices of columns, with rows swizzled like the maps of y and of the residual.
template <class Traits>
class Staging {
    using T = typename Traits::Value;
    static constexpr int row_bytes = Traits::slice_row_bytes;

   public:
    static constexpr int chunks_per_row = row_bytes / 16;
    using Values = device::Packed<8, T>;

    __device__ Staging(const Group& group, Shared<Traits>& shared)
        : first_(device::shared_address(&shared.staged[group.index][0][0])) {
        // 16-bit types: addresses for load_matrices and store_matrices. float32: where the thread's own sums are.
        own_row_ = group.warp * 16 + (sizeof(T) == 2 ? group.lane / 16 * 8 + group.lane % 8 : group.lane / 4);
        own_chunk_ = sizeof(T) == 2 ? group.lane / 8 % 2 : group.lane % 4 / 2;
        own_offset_ = sizeof(T) == 2 ? 0 : group.lane % 2 * 8;
    }

    __device__ uint32_t slice(int slice) const { return first_ + slice * Traits::slice_bytes; }
    __device__ uint32_t address(int slice, int row, int chunk) const {
        return this->slice(slice) + row * row_bytes + gather::swizzle<row_bytes>(row, chunk) * 16;
    }

    // The thread's values in half of a slice, for a block of 64 rows: two pairs of columns in each of two rows 8 apart.
    __device__ __forceinline__ void load(int slice, int block, int half, Values& values) const {
        if constexpr (sizeof(T) == 2) {
            device::load_matrices(own_address(slice, block * 64, half * 2), values.words);
        } else {
            each_pair([&](int row, int pair, int i) {
                uint32_t words[2];
                device::load_shared(own_address(slice, block * 64 + row, half * 4 + pair * 2), words);
                values.words[i] = words[0];
                values.words[i + 1] = words[1];
            });
        }
    }
    __device__ __forceinline__ void store(int slice, int block, int half, const Values& values) const {
        if constexpr (sizeof(T) == 2) {
            device::store_matrices(own_address(slice, block * 64, half * 2), values.words);
        } else {
            each_pair([&](int row, int pair, int i) {
                const uint32_t words[2] = {values.words[i], values.words[i + 1]};
                device::store_shared(own_address(slice, block * 64 + row, half * 4 + pair * 2), words);
            });
        }
    }

   private:
    // `row` is a multiple of 8, which does not change the swizzle.
    __device__ uint32_t own_address(int slice, int row, int chunk) const {
        return this->slice(slice) + (own_row_ + row) * row_bytes +
               gather::swizzle<row_bytes>(own_row_, chunk + own_chunk_) * 16 + own_offset_;
    }

    template <class Access>
    static __device__ __forceinline__ void each_pair(const Access& access) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) access(i / 4 * 8, i / 2 % 2, i);
    }

    uint32_t first_;
    int own_row_, own_chunk_, own_offset_;
};

template <class Traits>
class Epilogue {
    using T = typename Traits::Value;
    static constexpr int channels_per_thread = (Traits::n + 127) / 128, parts = Traits::slices * Traits::blocks;
    using Sums = float[Traits::blocks][Traits::n / 2];

   public:
    // Starts loading the fold's vectors, so that they arrive during the main loop.
    __device__ Epilogue(const Args& args, const Group& group, Shared<Traits>& shared, const gather::Block& block,
                        int first_row)
        : args_(args),
          group_(group),
          shared_(shared),
          block_(block),
          first_row_(first_row),
          rank_(split() > 1 ? device::cluster_rank() : 0) {
#pragma unroll
        for (int i = 0; i < channels_per_thread; ++i) {
            const int column = group.thread + i * 128;
            vectors_[i] = {args.conv.epilogue, block.first_channel(args) + column, column < block.columns};
        }
    }

    // Starts copying the residual to shared memory, once the previous tile's output has left it.
    __device__ __forceinline__ void ask_residual() {
        if (!args_.residual_by_map || !group_.leads()) return;
        device::wait_stores_read<0>();
        int bytes = 0;
#pragma unroll 1
        for (int slice = rank_; slice < slices(); slice += split()) bytes += Traits::slice_bytes;
        device::PhaseBarrier& barrier = shared_.residual[group_.index];
        device::arrive_expecting(barrier, bytes);
#pragma unroll 1
        for (int slice = rank_; slice < slices(); slice += split()) {
            device::load_tile(staging().slice(slice), args_.residual_map, barrier, column_of(slice), block_.group,
                              first_row_);
        }
    }

    // Finishes and stores the tile. With a split, each block has the sums of its share of the reduction and finishes every
    // split-th slice. `parity`: of the residual's barrier.
    __device__ __forceinline__ void finish(const Sums& sums, int parity) {
        if (split() > 1) publish_sums(sums);
        prepare(parity);
        if (split() == 1 && args_.conv.epilogue.activation.is_clamp) {
            finish_clamped(sums);
        } else {
            finish_in_turns(sums);
        }
        store();
    }

   private:
    // Blocks that share the tile.
    __device__ int split() const { return Traits::is_pingpong ? 1 : args_.split.value; }
    __device__ int slices() const { return (block_.columns + Tile::slice - 1) / Tile::slice; }
    // Made where it is needed: kept, it would take registers from the sums.
    __device__ Staging<Traits> staging() const { return Staging<Traits>(group_, shared_); }
    __device__ int column_of(int slice) const { return block_.first_column + slice * Tile::slice; }

    // Completes the folds, and waits for the residual.
    __device__ __forceinline__ void prepare(int parity) {
#pragma unroll
        for (int i = 0; i < channels_per_thread; ++i) {
            const int column = group_.thread + i * 128;
            if (column >= Traits::n) continue;
            const ChannelFold fold = vectors_[i].fold(args_.conv.epilogue);
            auto& folds = shared_.folds[group_.index];
            folds[0][column] = fold.scale;
            folds[1][column] = fold.offset;
            folds[2][column] = fold.beta;
        }
        if (group_.leads()) device::wait_stores_read<0>();
        group_.sync();
        if (args_.residual_by_map) {
            device::wait(shared_.residual[group_.index], parity);
        } else if (args_.conv.residual) {
            copy_residual();
            group_.sync();
        }
    }

    // For identity, relu and relu6, which only clamp. Unrolled, because registers cannot be indexed.
    __device__ __forceinline__ void finish_clamped(const Sums& sums) {
        const float low = args_.conv.epilogue.activation.low, high = args_.conv.epilogue.activation.high;
#pragma unroll
        for (int slice = 0; slice < Traits::slices; ++slice) {
            if (slice >= slices()) continue;
#pragma unroll
            for (int i = 0; i < 2 * Traits::blocks; ++i) {
                const int half = i / Traits::blocks, block = i % Traits::blocks;
                float own[16];
                take_sums(sums[block], slice, own);
                finish_half(slice, block, half, own, [&](float (&all)[8]) {
#pragma unroll
                    for (float& value : all) value = device::clamp(value, low, high);
                });
            }
        }
    }

    // For all other activations, which are too long to unroll, and for splits, whose sums are in memory.
    __device__ __forceinline__ void finish_in_turns(const Sums& sums) {
#pragma unroll 1
        for (int slice = rank_; slice < slices(); slice += split()) {
#pragma unroll 1
            for (int block = 0; block < Traits::blocks; ++block) {
                float own[16];
                if (split() > 1) {
                    add_sums(slice * Traits::blocks + block, own);
                } else {
#pragma unroll
                    for (int i = 0; i < Traits::slices; ++i) {
#pragma unroll
                        for (int j = 0; j < Traits::blocks; ++j) {
                            if (i == slice && j == block) take_sums(sums[j], i, own);
                        }
                    }
                }
#pragma unroll 1
                for (int half = 0; half < 2; ++half) {
                    finish_half(slice, block, half, own,
                                [&](float (&all)[8]) { activate(all, args_.conv.epilogue.activation); });
                }
            }
        }
    }

    // The sums of a slice, one half after the other: two pairs of columns of each row.
    static __device__ __forceinline__ void take_sums(const float (&sums)[Traits::n / 2], int slice, float (&own)[16]) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int half = i / 8, row = i / 4 % 2, pair = i / 2 % 2, column = i % 2;
            own[i] = sums[slice * 16 + half * 8 + pair * 4 + row * 2 + column];
        }
    }

    template <class Activate>
    __device__ __forceinline__ void finish_half(int slice, int block, int half, const float (&own)[16],
                                                const Activate& activate) {
        ChannelFold folds[4];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const int column = slice * Tile::slice + half * 16 + pair * 8 + group_.lane % 4 * 2;
            device::FloatPair parts[3];
#pragma unroll
            for (int part = 0; part < 3; ++part) {
                parts[part] = *reinterpret_cast<const device::FloatPair*>(&shared_.folds[group_.index][part][column]);
            }
            folds[pair * 2] = {parts[0].first, parts[1].first, parts[2].first};
            folds[pair * 2 + 1] = {parts[0].second, parts[1].second, parts[2].second};
        }
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = half == 0 ? own[i] : own[8 + i];
        const bool has_residual = args_.conv.residual != nullptr;
        device::Packed<8, T> residual;
        if (has_residual) staging().load(slice, block, half, residual);
        finish_values<2, 4, T>(values, folds, has_residual, residual, args_.conv.epilogue.residual_order, activate);
        staging().store(slice, block, half, device::round_values<8, T>(values));
    }

    // Writes all sums to shared memory for the cluster, over the operands, which every warpgroup has finished multiplying.
    __device__ __forceinline__ void publish_sums(const Sums& sums) {
        device::named_barrier(1 + Traits::consumers, Traits::consumers * 128);
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            float own[16];
            take_sums(sums[part % Traits::blocks], part / Traits::blocks, own);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                device::Vector16 four;
                memcpy(&four, own + i * 4, sizeof(four));
                device::store_shared(sums_address(part, i), four);
            }
        }
        device::sync_cluster();
    }

    __device__ uint32_t sums_address(int part, int i) const {
        return device::shared_address(&shared_.sums[part * 4 + i][group_.index * 128 + group_.thread]);
    }

    // Adds the shares in order, whichever block does it. Two shares are loaded at once.
    __device__ __forceinline__ void add_sums(int part, float (&own)[16]) const {
#pragma unroll
        for (float& value : own) value = 0;
#pragma unroll 1
        for (int share = 0; share < split(); share += 2) {
            device::Vector16 added[8] = {};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (share + i / 4 < split()) added[i] = device::load_cluster(sums_address(part, i % 4), share + i / 4);
            }
            float values[32];
            memcpy(values, added, sizeof(values));
#pragma unroll
            for (int i = 0; i < 32; ++i) own[i % 16] += values[i];
        }
    }

    __device__ __forceinline__ void store() {
        if (args_.y_by_map) {
            device::fence_async_proxy();
            group_.sync();
            if (!group_.leads()) return;
            for (int slice = rank_; slice < slices(); slice += split()) {
                device::store_tile(args_.y_map, staging().slice(slice), column_of(slice), block_.group, first_row_);
            }
            device::commit_stores();
        } else {
            group_.sync();
            store_rows();
            // the next residual's bulk copy may overwrite what these stores read
            device::fence_async_proxy();
            group_.sync();
        }
    }

    // Calls visit(address of 16 bytes in shared memory, their pixel's place, first channel, how many exist). Neighbouring
    // threads go along the dense dimension of the tensor. A thread gets the same chunks for loading and for storing, as
    // needed where the residual is y itself.
    template <class Visit>
    __device__ __forceinline__ void for_own_chunks(const Visit& visit) const {
        constexpr int per_chunk = device::values_per_vector<T>, per_row = Traits::n / per_chunk;
        constexpr int per_slice = Staging<Traits>::chunks_per_row;
        const bool along_channels = args_.conv.y_strides.c == 1;
#pragma unroll 1
        for (int i = group_.thread; i < Traits::rows * per_row; i += 128) {
            const int row = along_channels ? i / per_row : i % Traits::rows;
            const int chunk = along_channels ? i % per_row : i / Traits::rows;
            const int slice = chunk / per_slice, remaining = block_.columns - chunk * per_chunk;
            const RowPlace place = place_of_pixel(args_.conv, args_.x.output.pixel_of_row(first_row_ + row));
            if (slice % split() != rank_ || remaining <= 0 || !place.exists()) continue;
            visit(staging().address(slice, row, chunk % per_slice), place, block_.first_channel(args_) + chunk * per_chunk,
                  remaining < per_chunk ? remaining : per_chunk);
        }
    }

    __device__ __forceinline__ void copy_residual() const {
        for_own_chunks([&](uint32_t address, const RowPlace& place, int channel, int valid) {
            constexpr int width = device::values_per_vector<T>;
            device::Packed<width, T> chunk;
            const T* residual = residual_at<T>(args_.conv, place, channel);
            load_channels<width, 1, T>({{{residual}}, args_.conv.residual_strides.c, valid}, chunk);
            device::store_shared(address, chunk.vector(0));
        });
    }

    __device__ __forceinline__ void store_rows() const {
        for_own_chunks([&](uint32_t address, const RowPlace& place, int channel, int valid) {
            constexpr int width = device::values_per_vector<T>;
            const device::Vector16 chunk = device::load_shared(address);
            T* y = static_cast<T*>(args_.conv.y) + place.y + channel * args_.conv.y_strides.c;
            const Channels<1, T> destination{{{y}}, args_.conv.y_strides.c, valid};
            if (destination.template takes_vectors<width>()) {
                *reinterpret_cast<device::Vector16*>(y) = chunk;
                return;
            }
            T parts[width];
            memcpy(parts, &chunk, sizeof(parts));
#pragma unroll
            for (int i = 0; i < width; ++i) {
                if (i < valid) y[i * destination.stride] = parts[i];
            }
        });
    }

    const Args& args_;
    const Group& group_;
    Shared<Traits>& shared_;
    const gather::Block block_;
    const int first_row_;
    const int rank_;  // of this block in its cluster
    ChannelVectors<T> vectors_[channels_per_thread];
};

}  // namespace fused_cna::implicit_gemm_sm90
