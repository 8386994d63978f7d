#include "torch/overlap.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace fused_cna {

namespace {

// `step` times an integer from `lowest` to `highest`.
struct Term {
    int64_t step, lowest, highest;
};

constexpr int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// Looks for one integer per term so that the terms add up to a target.
class Search {
   public:
    explicit Search(std::vector<Term> terms) : terms_(std::move(terms)) {
        std::ranges::sort(terms_, std::ranges::greater(), &Term::step);
    }

    Overlap find(int64_t target) {
        const bool found = finds(target, 0);
        return steps_ > most_steps ? Overlap::unknown : found ? Overlap::some : Overlap::none;
    }

   private:
    // Far more than slices of one tensor need: they leave at most two integers to try per dimension.
    static constexpr int most_steps = 4096;

    // For the terms from `first` on. Nested steps leave few integers to try, because the smaller steps cannot reach further.
    bool finds(int64_t target, size_t first) {
        if (++steps_ > most_steps) return false;
        if (first == terms_.size()) return target == 0;
        const Term& term = terms_[first];
        int64_t rest_lowest = 0, rest_highest = 0;
        for (size_t i = first + 1; i < terms_.size(); ++i) {
            rest_lowest += terms_[i].step * terms_[i].lowest;
            rest_highest += terms_[i].step * terms_[i].highest;
        }
        const int64_t least = std::max(term.lowest, -floor_div(rest_highest - target, term.step));
        const int64_t most = std::min(term.highest, floor_div(target - rest_lowest, term.step));
        for (int64_t number = least; number <= most && steps_ <= most_steps; ++number) {
            if (finds(target - number * term.step, first + 1)) return true;
        }
        return false;
    }

    std::vector<Term> terms_;
    int steps_ = 0;
};

bool is_empty(const StridedView& view) { return std::ranges::find(view.sizes, 0) != view.sizes.end(); }

struct Dimension {
    int64_t step, size;  // step in bytes

    bool operator==(const Dimension&) const = default;
};

// The dimensions of more than one element.
std::vector<Dimension> dimensions_of(const StridedView& view) {
    std::vector<Dimension> dimensions;
    for (size_t i = 0; i < view.sizes.size(); ++i) {
        if (view.sizes[i] > 1) dimensions.push_back({view.strides[i] * view.element_bytes, view.sizes[i]});
    }
    return dimensions;
}

// The address after the last element.
int64_t end_of(const StridedView& view) {
    int64_t last = view.start;
    for (size_t i = 0; i < view.sizes.size(); ++i) {
        if (view.sizes[i] > 1) last += view.strides[i] * view.element_bytes * (view.sizes[i] - 1);
    }
    return last + view.element_bytes;
}

void add(std::vector<Term>& terms, const Term& term) {
    if (term.step == 0) return;
    const auto found = std::ranges::find(terms, term.step, &Term::step);
    if (found == terms.end()) return terms.push_back(term);
    found->lowest += term.lowest;
    found->highest += term.highest;
}

}  // namespace

Overlap overlaps_itself(const StridedView& view) {
    if (is_empty(view)) return Overlap::none;
    std::vector<Dimension> dimensions = dimensions_of(view);
    std::ranges::sort(dimensions, std::ranges::greater(), &Dimension::step);
    if (!dimensions.empty() && dimensions.back().step == 0) return Overlap::some;
    // Two elements whose indices first differ in dimension i; the second has the larger index there.
    for (size_t i = 0; i < dimensions.size(); ++i) {
        std::vector<Term> terms{{dimensions[i].step, 1, dimensions[i].size - 1}};
        for (size_t j = i + 1; j < dimensions.size(); ++j) {
            terms.push_back({dimensions[j].step, 1 - dimensions[j].size, dimensions[j].size - 1});
        }
        const Overlap found = Search(std::move(terms)).find(0);
        if (found != Overlap::none) return found;
    }
    return Overlap::none;
}

Overlap overlaps(const StridedView& a, const StridedView& b) {
    if (is_empty(a) || is_empty(b) || end_of(a) <= b.start || end_of(b) <= a.start) return Overlap::none;
    std::vector<Term> terms;
    for (const auto& [step, size] : dimensions_of(a)) add(terms, {step, 0, size - 1});
    for (const auto& [step, size] : dimensions_of(b)) add(terms, {step, 1 - size, 0});
    add(terms, {1, 1 - b.element_bytes, a.element_bytes - 1});
    return Search(std::move(terms)).find(b.start - a.start);
}

bool is_same_view(const StridedView& a, const StridedView& b) {
    return a.start == b.start && dimensions_of(a) == dimensions_of(b);
}

}  // namespace fused_cna
