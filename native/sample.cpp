// From logits to codes: guidance, temperature, top-k, top-p and a Gumbel-max draw, one code after the other.
//
// The same as autoregressive/models/sampling.py in PyTorch, with which the tests compare it. Faster: only the best
// codes are sorted, and noise is made only for codes that can be drawn.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "philox.h"
#include "simd.h"
#include "team.h"

struct Draws {
    const float* logits;            // (rows, stride)
    int64_t stride, vocab, count;
    const int64_t *conditional, *unconditional;  // (count,) rows of logits, the latter -1 where there is no guidance
    const int64_t *image, *position;             // (count,)
    const float* scale;             // (count,) of guidance
    const float* temperature;       // (images,) each, as are the following
    const int64_t* top_k;           // 0: all
    const float* top_p;             // 1: all
    const int64_t* key;
    const uint8_t* greedy;          // takes the best code
    int64_t* codes;                 // (count,) out
    uint8_t* finite;                // (count,) out: whether all guided logits are
    int64_t threads;
};

// The k-th largest of n numbers: found among those that share its first bits.
static float kth_largest(const float* x, int64_t n, int64_t k, std::vector<float>& room) {
    constexpr int FIRST = 12;
    const auto first_bits = [](float value) {  // the larger the number, the smaller these
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return (bits ^ (0x7fffffffu & ~(uint32_t)((int32_t)bits >> 31))) >> (32 - FIRST);
    };
    uint32_t counts[2][1 << FIRST] = {};
    for (int64_t i = 0; i < n; i++) counts[i & 1][first_bits(x[i])]++;  // in two tables: neighbours are often alike
    uint32_t bucket = 0;
    for (int64_t here; k > (here = counts[0][bucket] + counts[1][bucket]); bucket++) k -= here;
    room.clear();
    for (int64_t i = 0; i < n; i++)
        if (first_bits(x[i]) == bucket) room.push_back(x[i]);
    std::nth_element(room.begin(), room.begin() + k - 1, room.end(), std::greater<float>());
    return room[k - 1];
}

// -ln(-ln(1 - u)) for u = (bits + 1/2) / 2^32: small u, which win, keep their precision.
static inline f8 gumbel(u8 bits) {
    const f8 x = __builtin_convertvector(bits, f8) * all(0x1p-32f) + all(0x1p-33f), one = all(1.0f);
    const f8 series = x * (one + x * (all(1 / 2.0f) + x * (all(1 / 3.0f) + x * (all(1 / 4.0f) + x * all(1 / 5.0f)))));
    const f8 rest = one - x, far = all(0.0f) - logarithm(select(rest > all(0.0f), rest, all(0x1p-24f)));
    return all(0.0f) - logarithm(select(x < all(0x1p-6f), series, far));
}

static int64_t draw(const Draws& d, int64_t i, std::vector<float>& logits, std::vector<float>& other,
                    std::vector<std::pair<float, int32_t>>& ranked) {
    const int64_t V = d.vocab, padded = (int64_t)logits.size(), image = d.image[i], top_k = d.top_k[image];
    const float top_p = d.top_p[image];
    const float* c = d.logits + d.conditional[i] * d.stride;
    const float* u = d.unconditional[i] < 0 ? nullptr : d.logits + d.unconditional[i] * d.stride;
    const float scale = d.scale[i], divisor = std::max(d.temperature[image], 1e-5f);
    int broken = 0;
    for (int64_t v = 0; v < V; v++) {
        const float guided = u ? u[v] + scale * (c[v] - u[v]) : c[v], x = guided / divisor;
        broken |= !(guided - guided == 0);  // infinite, or not a number
        logits[v] = x == x ? x : -std::numeric_limits<float>::infinity();  // not a number: never drawn
    }
    d.finite[i] = !broken;
    std::fill(logits.begin() + V, logits.end(), -std::numeric_limits<float>::infinity());
    if (d.greedy[image]) return std::max_element(logits.begin(), logits.begin() + V) - logits.begin();

    float least = -std::numeric_limits<float>::infinity();
    if (0 < top_k && top_k < V) least = kth_largest(logits.data(), V, top_k, other);
    int64_t last = padded;  // of codes that tie with `least`, those from here on are out
    if (top_p < 1) {
        ranked.clear();
        double mass = 0;
        const float top = *std::max_element(logits.begin(), logits.begin() + V);
        for (int64_t v = 0; v < V; v++)
            if (logits[v] >= least) ranked.emplace_back(-logits[v], (int32_t)v), mass += std::exp(logits[v] - top);
        const size_t survivors = ranked.size();
        double before = 0;
        size_t rank = 0, sorted = 0;
        while (rank < survivors && (rank == 0 || before <= top_p * mass)) {
            if (rank == sorted) {  // sort a few more: most often the first 512 are enough
                sorted = std::min(survivors, sorted ? 4 * sorted : 512);
                if (sorted < survivors) std::nth_element(ranked.begin() + rank, ranked.begin() + sorted, ranked.end());
                std::sort(ranked.begin() + rank, ranked.begin() + sorted);
            }
            before += std::exp(-ranked[rank].first - top), rank++;
        }
        least = -ranked[rank - 1].first, last = ranked[rank - 1].second + 1;
        if (rank < survivors) {  // those that tie with the last one kept, but come later, are out
            for (int64_t v = last; v < V; v++)
                if (logits[v] == least) logits[v] = -std::numeric_limits<float>::infinity();
        }
    }

    f8 best = all(-std::numeric_limits<float>::infinity());
    i8 place = {}, lanes = {0, 4, 8, 12, 16, 20, 24, 28};
    for (int64_t start = 0; start < V; start += 32) {
        bool any = false;
        for (int64_t v = start; v < start + 32; v++) any |= logits[v] >= least;
        if (!any) continue;
        u8 bits[4];
        philox((uint64_t)d.key[image], (uint32_t)d.position[i], (uint32_t)(start / 4), bits);
        for (int j = 0; j < 4; j++) {  // codes start + j, start + j + 4, …
            float strided[8];
            for (int l = 0; l < 8; l++) strided[l] = logits[start + j + 4 * l];
            const f8 x = load(strided), score = x + gumbel(bits[j]);
            const i8 better = (score > best) & (x >= all(least));
            best = select(better, score, best);
            place = (better & (lanes + (int32_t)(start + j))) | (~better & place);
        }
    }
    int winner = 0;
    for (int l = 1; l < 8; l++)
        if (best[l] > best[winner] || (best[l] == best[winner] && place[l] < place[winner])) winner = l;
    return place[winner];
}

extern "C" void sample(const Draws* d) {
    struct alignas(64) Own {
        std::vector<float> logits, other;
        std::vector<std::pair<float, int32_t>> ranked;
    };
    Team::Call team(d->threads);
    std::vector<Own> own(team.threads());
    team.loop(d->count, [&](int64_t i, int64_t thread) {
        Own& mine = own[thread];
        mine.logits.resize((d->vocab + 31) / 32 * 32);
        d->codes[i] = draw(*d, i, mine.logits, mine.other, mine.ranked);
    });
}
