// Tokens of logits as runtime/rounds/sampling.py defines them: top-k, top-p, Gumbel-max. Rows that it cannot decide for
// certain are AMBIGUOUS and left to the definition.
//
// Most tokens cannot win and are skipped early. A row is read in chunks of 32 whose largest logits are found first.
// Dividing by the temperature keeps order, so top-k and top-p keep all logits from some floor on: chunks below it are
// skipped, and so are chunks that even the largest possible noise cannot lift above the best token. Other chunks draw
// noise as integers; a bound on the Gumbel value, one conversion and one product, excludes more. About log(V) tokens
// remain, computed in double precision.
//
// Top-p needs no sorting: the winner among all tokens is kept if the mass of more probable tokens is below the
// requested share; otherwise it and everything below are dropped, and the next winner is searched above it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "philox.h"

namespace {

// What a row's token may be besides a token.
constexpr int32_t NOT_WANTED = -1;  // it follows a proposal that is not the token there
constexpr int32_t AMBIGUOUS = -2;   // which of two is larger may depend on how PyTorch rounds its logarithms

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// The masses of runtime/rounds/sampling.py.
constexpr int OCTAVE_BITS = 20;
constexpr float FARTHEST = 43.0f;
constexpr float STEPS_A_NAT = (float)(1.4426950408889634 * (1 << OCTAVE_BITS));
constexpr uint64_t WHOLE_MASS = 1u << 30;
constexpr uint64_t MASS_COEFFICIENTS[] = {744257403, 257891464, 59375084, 9884648, 1014582};
constexpr int SHARE_BITS = 24;
constexpr float NO_MASS = 22.0f;  // nats below the peak from where on a mass is 0: 31 octaves are 21.49

// The largest noise, 33 log 2 = 22.873, of the word 0.
constexpr float MOST_NOISE = 22.88f;
// Error of PyTorch's float32 log1p and log in units in the last place: MKL and SLEEF promise 1, glibc 2 for log1p. The
// logarithm keeps the first relative error, because d log(e) = de / e, and adds its own.
constexpr double ULPS = 4.0;

struct Range {
    float least, most;
};

// Where the definition's noise of a word lies.
inline Range gumbel(uint32_t word) {
    // As there, in float32: what the word becomes is rounded.
    const float uniform = std::min(((float)word + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
    const double noise = -std::log(-std::log1p(-(double)uniform));
    const double error = ULPS * 0x1p-23 * (1.01 + std::abs(noise));
    // Rounding keeps order: a float32 within the error of the noise is between these two.
    return {(float)(noise - error), (float)(noise + error)};
}

// Tokens that may win. Scores are ranges because noise is; a range of one number is exact, and ties go to the lowest
// token.
class Contest {
   public:
    void add(int32_t token, float scaled, Range noise) {
        // The sum is rounded, which keeps order as well.
        const float least = scaled + noise.least, most = scaled + noise.most;
        bar_ = std::max(bar_, least);
        if (least == most) {
            if (known_ < 0 || least > known_score_ || (least == known_score_ && token < known_)) {
                known_ = token;
                known_score_ = least;
            }
        } else if (most > best_most_ || best_ < 0) {
            second_most_ = best_most_;
            best_ = token;
            best_least_ = least;
            best_most_ = most;
        } else {
            second_most_ = std::max(second_most_, most);
        }
    }

    // A score below it is not the largest.
    float bar() const { return bar_; }

    int32_t winner() const {
        if (best_ < 0 || (known_ >= 0 && known_score_ > best_most_)) return known_;
        const float other = known_ < 0 ? second_most_ : std::max(second_most_, known_score_);
        return best_least_ > other ? best_ : AMBIGUOUS;
    }

   private:
    float bar_ = -INFINITE, known_score_ = -INFINITE;
    float best_least_ = -INFINITE, best_most_ = -INFINITE, second_most_ = -INFINITE;
    int32_t known_ = -1, best_ = -1;
};

// Integers in the order of the floats whose bits they are, and back.
inline int32_t ordered(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >= 0 ? bits : bits ^ 0x7FFFFFFF;
}
inline float number(int32_t order) {
    const int32_t bits = order >= 0 ? order : order ^ 0x7FFFFFFF;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

class Row {
   public:
    Row(const float* logits, int64_t vocab_size, float temperature, std::vector<float>& scratch)
        : logits_(logits), vocab_size_(vocab_size), temperature_(temperature), scratch_(scratch) {
        num_chunks_ = (vocab_size + CHUNK - 1) / CHUNK;
        std::fill(tail_, tail_ + CHUNK, -INFINITE);
        std::copy(logits + (num_chunks_ - 1) * CHUNK, logits + vocab_size, tail_);
        scratch.resize(num_chunks_ * (1 + CHUNK));
    }

    int32_t token(const Philox& noise, int64_t top_k, uint32_t top_p_share) {
        if (temperature_ == INFINITE) return AMBIGUOUS;  // 0 or not a number: nothing to be fast at
        if (!find_peak()) return first([](float logit) { return logit != logit; });
        if (peak_ == INFINITE) return first([&](float logit) { return logit / temperature_ == INFINITE; });
        if (peak_ == -INFINITE) return 0;
        float floor = -INFINITE;
        if (0 < top_k && top_k < vocab_size_) floor = least_logit(largest(top_k) / temperature_);
        if (!top_p_share) return draw(noise, floor);
        const unsigned __int128 share = (unsigned __int128)mass_from(floor) * top_p_share;
        const uint64_t needed = (uint64_t)((share + (1u << SHARE_BITS) - 1) >> SHARE_BITS);
        while (true) {
            const int32_t token = draw(noise, floor);
            if (token < 0) return token;
            const float scaled = logits_[token] / temperature_;
            if (scaled == peak_) return token;
            const float above = least_logit(std::nextafterf(scaled, INFINITE));
            if (mass_from(above) < needed) return token;
            floor = above;
        }
    }

   private:
    const float* chunk(int64_t index) const { return index < num_chunks_ - 1 ? logits_ + index * CHUNK : tail_; }
    float* largest_of_chunk() const { return scratch_.data(); }

    template <typename Condition>
    int32_t first(Condition holds) const {
        return (int32_t)(std::find_if(logits_, logits_ + vocab_size_, holds) - logits_);
    }

    // The largest logit of every chunk and of all; false where one is NaN.
    bool find_peak() {
        vi is_odd = {};
        vf all = vf{} - INFINITE;
        for (int64_t c = 0; c < num_chunks_; c++) {
            const float* logits = chunk(c);
            vf most = load<vf>(logits);
            is_odd |= most != most;
            for (int part = 1; part < PARTS; part++) {
                const vf v = load<vf>(logits + part * W);
                is_odd |= v != v;
                most = larger(most, v);
            }
            all = larger(all, most);
            largest_of_chunk()[c] = largest_lane(most);
        }
        if (any(is_odd)) return false;
        peak_logit_ = largest_lane(all);
        peak_ = peak_logit_ / temperature_;
        const int64_t c = std::find(largest_of_chunk(), largest_of_chunk() + num_chunks_, peak_logit_) - largest_of_chunk();
        peak_token_ = (int32_t)(c * CHUNK + (std::find(chunk(c), chunk(c) + CHUNK, peak_logit_) - chunk(c)));
        return true;
    }

    // The k-th largest logit. k of the chunks have a logit as large as the k-th largest of theirs, which leaves little
    // to look through.
    float largest(int64_t k) const {
        float* others = scratch_.data() + num_chunks_;
        float bound = -INFINITE;
        if (k <= num_chunks_) {
            std::copy(largest_of_chunk(), largest_of_chunk() + num_chunks_, others);
            std::nth_element(others, others + k - 1, others + num_chunks_, std::greater<float>());
            bound = others[k - 1];
        }
        int64_t count = 0;
        for (int64_t c = 0; c < num_chunks_; c++) {
            if (largest_of_chunk()[c] < bound) continue;
            const float* logits = chunk(c);
            for (int i = 0; i < CHUNK; i++) {
                others[count] = logits[i];
                count += logits[i] >= bound;
            }
        }
        std::nth_element(others, others + k - 1, others + count, std::greater<float>());
        return others[k - 1];
    }

    // The least float32 whose quotient is `scaled` or more; the peak's is.
    float least_logit(float scaled) const {
        int64_t below = (int64_t)ordered(-INFINITE) - 1, found = ordered(peak_logit_);
        while (found - below > 1) {
            const int64_t middle = below + (found - below) / 2;
            (number((int32_t)middle) / temperature_ >= scaled ? found : below) = middle;
        }
        return number((int32_t)found);
    }

    // Sum of the masses of all logits from `floor` on. No product is added to here, so that none can be fused.
    uint64_t mass_from(float floor) const {
        const float reciprocal = 1.0f / temperature_, none = peak_ - NO_MASS - slack(peak_);
        vq sum = {};
        for (int64_t c = 0; c < num_chunks_; c++) {
            const float most = largest_of_chunk()[c];
            if (most < floor || most * reciprocal < none) continue;
            const float* logits = chunk(c);
            for (int part = 0; part < PARTS; part++) {
                const vf logit = load<vf>(logits + part * W);
                vf below = peak_ - logit / temperature_;
                below = below < FARTHEST ? below : vf{} + FARTHEST;
                below = logit >= floor ? below : vf{} + FARTHEST;
                const vq steps = (vq)__builtin_convertvector(below * STEPS_A_NAT, vi);
                sum += mass(steps & 0xFFFFFFFFu) + mass(steps >> 32);
            }
        }
        uint64_t total = 0;
        for (int lane = 0; lane < LANES64; lane++) total += sum[lane];
        return total;
    }

    static vq mass(vq steps) {
        const vq x = steps & ((1u << OCTAVE_BITS) - 1);
        vq mass = vq{} + MASS_COEFFICIENTS[4];
        for (int i = 3; i >= 0; i--) mass = MASS_COEFFICIENTS[i] - (low_product(mass, x) >> OCTAVE_BITS);
        mass = WHOLE_MASS - (low_product(mass, x) >> OCTAVE_BITS);
        return mass >> (steps >> OCTAVE_BITS);
    }

    // More than float32 loses in `scaled + bound of the noise` where that sum is near `score`. A logit whose quotient
    // is more than twice as large, or as far below, is decided by its size.
    static float slack(float score) { return 0x1p-8f + 0x1p-18f * std::abs(score); }

    int32_t draw(const Philox& noise, float floor) const {
        Contest contest;
        // The peak first: with it most of the others need not be looked at.
        vu words[PARTS];
        noise.chunk(peak_token_ / CHUNK * (CHUNK / 4), words);
        uint32_t word[CHUNK];
        std::memcpy(word, words, sizeof word);
        contest.add(peak_token_, peak_, gumbel(word[peak_token_ % CHUNK]));

        const float reciprocal = 1.0f / temperature_;
        float bar = contest.bar() - slack(contest.bar());
        for (int64_t c = 0; c < num_chunks_; c++) {
            const float most = largest_of_chunk()[c];
            if (most < floor || most * reciprocal < bar - MOST_NOISE) continue;
            const float* logits = chunk(c);
            noise.chunk((uint32_t)(c * (CHUNK / 4)), words);
            vi may_win[PARTS], one_may = {};
            for (int part = 0; part < PARTS; part++) {
                const vf logit = load<vf>(logits + part * W);
                may_win[part] = (logit * reciprocal + most_noise(words[part]) >= bar) & (logit >= floor);
                one_may |= may_win[part];
            }
            if (!any(one_may)) continue;
            int32_t may[CHUNK];
            std::memcpy(may, may_win, sizeof may);
            std::memcpy(word, words, sizeof word);
            for (int i = 0; i < CHUNK; i++) {
                const int32_t token = (int32_t)(c * CHUNK + i);
                if (may[i] && token != peak_token_) contest.add(token, logits[i] / temperature_, gumbel(word[i]));
            }
            bar = contest.bar() - slack(contest.bar());
        }
        return contest.winner();
    }

    // At least the noise of each word, but for rounding. -log(-log(1 - v)) is less than -log(v), and the bits of a
    // float, as an integer, are its logarithm to base 2 but for up to 0.09 less.
    static vf most_noise(vu words) {
        const float octave = 0.6931472f;
        // Half of the word, because a conversion takes signed integers.
        const vf half = __builtin_convertvector((vi)(words >> 1), vf);
        return 158.0f * octave - __builtin_convertvector((vi)half, vf) * (octave * 0x1p-23f);
    }

    const float* logits_;
    const int64_t vocab_size_;
    const float temperature_;
    int64_t num_chunks_;
    float peak_logit_ = 0, peak_ = 0;
    int32_t peak_token_ = 0;
    float tail_[CHUNK];
    std::vector<float>& scratch_;  // the largest logit of each chunk, then room for all
};

}  // namespace

extern "C" {

// One sequence's part of a round; mirrored in ../sampling.py.
struct SampledSequence {
    uint64_t seed, key;
    int64_t top_k;
    double temperature;
    uint32_t top_p_share;
    int32_t first_row, num_rows;
};

// rows [3, R]: of each row its token, its position, and room for the token after it, which is at the next position. That
// becomes a token, AMBIGUOUS, or NOT_WANTED: a row is wanted if it is the first of a sequence, or holds the token chosen
// after the row before it.
void speedstack_sample(const float* logits, int64_t stride, int64_t vocab_size, const SampledSequence* sequences,
                       int64_t num_sequences, int32_t* rows, int64_t num_rows) {
    static thread_local std::vector<float> scratch;
    const int32_t *tokens = rows, *positions = rows + num_rows;
    int32_t* chosen = rows + 2 * num_rows;
    std::fill(chosen, chosen + num_rows, NOT_WANTED);
    for (const SampledSequence* s = sequences; s < sequences + num_sequences; s++) {
        for (int32_t r = s->first_row; r < s->first_row + s->num_rows; r++) {
            if (r > s->first_row && chosen[r - 1] != tokens[r]) continue;
            Row row(logits + r * stride, vocab_size, (float)s->temperature, scratch);
            chosen[r] = row.token(Philox(s->seed, s->key, (uint32_t)positions[r] + 1), s->top_k, s->top_p_share);
        }
    }
}

}  // extern "C"
