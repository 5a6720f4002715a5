// One more token for every row of a batch: the layers of a Llama or Qwen2 model in float32, on a processor.
//
// Few rows meet all weights, so the weights must stream from memory while the arithmetic units are kept busy. Weights are laid out in
// panels of a few columns; a piece of a panel meets all rows while it lies in the first-level cache and the next one is fetched. With
// panels every output is one sum in the order of its inputs, whatever the number of threads and the other rows of the batch.

#include <immintrin.h>
#include <omp.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, BLOCK = 8;  // 8 rows x 3 vectors of sums fill 24 of 32 registers
#else
constexpr int LANES = 8, BLOCK = 4;  // 4 rows x 3 vectors of sums fill 12 of 16 registers
#endif
constexpr int VECTORS = 3, PANEL = VECTORS * LANES;
constexpr int LINE = 64;      // bytes fetched at once
constexpr int PIECE = 64;     // rows of a panel that stay in the first-level cache while all rows of a batch meet them
constexpr long AHEAD = 1024;  // numbers of a key or value that are fetched ahead

typedef float Lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(LANES * 4)));

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline void store(float* to, Lanes value) { *reinterpret_cast<Lanes*>(to) = value; }
inline Lanes all(float value) { return value - Lanes{}; }

inline float total(Lanes value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(value));
#endif
    float part[LANES];
    store(part, value);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

// The totals of as many vectors as a vector has numbers.
inline Lanes totals(const Lanes* rows) {
    Lanes result;
#if defined(__AVX512F__)
    __m512 pair[8], four[4];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = reinterpret_cast<__m512>(rows[2 * i]), b = reinterpret_cast<__m512>(rows[2 * i + 1]);
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; ++i)
        pair[i] = _mm512_add_ps(
            _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x44), _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xee));
    result = reinterpret_cast<Lanes>(
        _mm512_add_ps(_mm512_shuffle_f32x4(pair[0], pair[1], 0x88), _mm512_shuffle_f32x4(pair[0], pair[1], 0xdd)));
#else
    for (int i = 0; i < LANES; ++i) result[i] = total(rows[i]);
#endif
    return result;
}

// e^x by its power series on [-ln 2 / 2, ln 2 / 2], scaled by a power of two; exact but for the last places, 0 below -87.
inline Lanes exponential(Lanes x) {
    const Lanes low = all(-87.f), high = all(88.f);
    const auto vanished = x < low;
    x = vanished ? low : x;
    x = x > high ? high : x;
    const Lanes turns = x * 1.44269504088896f;
    const Whole n = __builtin_convertvector(turns + (turns < 0.f ? all(-.5f) : all(.5f)), Whole);
    const Lanes whole = __builtin_convertvector(n, Lanes);
    const Lanes rest = (x - whole * 0.693145751953125f) - whole * 1.42860682030941723e-6f;
    Lanes sum = all(1.f / 5040);
    for (float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) sum = sum * rest + factor;
    const Whole scale = (n + 127) << 23;
    Lanes power;
    std::memcpy(&power, &scale, sizeof power);
    return vanished ? all(0.f) : sum * power;
}

// x / (1 + e^-x) * y
inline Lanes gated(Lanes x, Lanes y) { return x / (1.f + exponential(-x)) * y; }

// ---------------------------------------------------------------------------------------------------------------------- threads

// What the workers of one call share. Work is taken piece by piece, because cores are not equally fast while others use them too.
// The threads are OpenMP's, which are torch's own: two pools would fight for the cores.
class Team {
  public:
    // Runs a task on every worker, itself included.
    template <class Task> static void run(int64_t size, Task task) {
        Team team;
#pragma omp parallel num_threads(static_cast<int>(size))
        task(Worker(team));
    }

    class Worker {
      public:
        explicit Worker(Team& team) : team_(team), size_(omp_get_num_threads()) {}

        int size() const { return size_; }

        // The next piece of work of this phase.
        long take() { return team_.taken_[phase_ % 2].fetch_add(1, std::memory_order_relaxed); }

        // All workers finish a phase before one begins the next.
        void meet() {
            if (omp_get_thread_num() == 0) team_.taken_[(phase_ + 1) % 2].store(0, std::memory_order_relaxed);
            ++phase_;
#pragma omp barrier
        }

      private:
        Team& team_;
        const int size_;
        long phase_ = 0;
    };

  private:
    std::atomic<long> taken_[2] = {{0}, {0}};
};
using Worker = Team::Worker;

// ---------------------------------------------------------------------------------------------------------------- linear layers

}  // namespace

extern "C" {

// Linear layers of the same input, their outputs side by side. panels: see emosteer_pack; without them, rows of weights [width, depth].
struct Matrix {
    const float* panels;
    const float* bias;
    const float* rows[3];
    int64_t widths[3];
    int64_t depth, width;
};

struct Layer {
    const float *norm1, *norm2;
    Matrix qkv, o, gate, up, down;
};

struct Model {
    int64_t layers, d_model, heads, kv_heads, d_head, d_mlp;
    float epsilon, epsilon_last, scale;
    const Layer* layer;
    const float* norm;
};

// hidden: [row, d_model], overwritten by the final-normed states. cosines, sines: [row, d_head], the first half of the sines negative.
// cache: [layer, key or value, row, kv head, position, d_head] with the strides given, in numbers; begins, ends: a row's first position and
// the one after its last, which is the new one. added: of every layer what follows attention and the MLP, [row, d_model] or nothing.
struct Batch {
    int64_t rows, threads;
    float* hidden;
    const float *cosines, *sines;
    float* cache;
    int64_t layer_stride, kind_stride, row_stride, head_stride;
    const int64_t *begins, *ends;
    const float* const* added;
};
}

namespace {

inline long panels_of(long width) { return (width + PANEL - 1) / PANEL; }

// Adds to sums [R, PANEL] the products of R rows of x [row, depth] with `steps` rows of a panel [depth, PANEL], and fetches FETCH lines
// per step from `ahead` on meanwhile.
template <int R, int FETCH>
inline void multiply(const float* x, long depth, long steps, const float* panel, const char* ahead, float* sums) {
    Lanes sum[R][VECTORS];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < VECTORS; ++c) sum[r][c] = load(sums + r * PANEL + c * LANES);
    for (long k = 0; k < steps; ++k) {
        Lanes weight[VECTORS];
        for (int c = 0; c < VECTORS; ++c) weight[c] = load(panel + k * PANEL + c * LANES);
        for (int f = 0; f < FETCH; ++f) __builtin_prefetch(ahead + (k * FETCH + f) * LINE, 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Lanes input = all(x[r * depth + k]);
#pragma GCC unroll 3
            for (int c = 0; c < VECTORS; ++c) sum[r][c] += weight[c] * input;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < VECTORS; ++c) store(sums + r * PANEL + c * LANES, sum[r][c]);
}

template <int FETCH>
void multiply_some(int rows, const float* x, long depth, long steps, const float* panel, const char* ahead, float* sums) {
    switch (rows) {
        case 1: return multiply<1, FETCH>(x, depth, steps, panel, ahead, sums);
        case 2: return multiply<2, FETCH>(x, depth, steps, panel, ahead, sums);
        case 3: return multiply<3, FETCH>(x, depth, steps, panel, ahead, sums);
        case 4: return multiply<4, FETCH>(x, depth, steps, panel, ahead, sums);
#if defined(__AVX512F__)
        case 5: return multiply<5, FETCH>(x, depth, steps, panel, ahead, sums);
        case 6: return multiply<6, FETCH>(x, depth, steps, panel, ahead, sums);
        case 7: return multiply<7, FETCH>(x, depth, steps, panel, ahead, sums);
        case 8: return multiply<8, FETCH>(x, depth, steps, panel, ahead, sums);
#endif
    }
}

// A panel meets all rows of x, a piece that fits the first-level cache at a time. sums: [row, PANEL].
void panel_of(const Matrix& matrix, long rows, const float* x, long panel, const float* next, float* sums) {
    const float* weights = matrix.panels + panel * matrix.depth * PANEL;
    const long depth = matrix.depth;
    std::memset(sums, 0, rows * PANEL * 4);
    for (long k = 0; k < depth; k += PIECE) {
        const long steps = depth - k < PIECE ? depth - k : PIECE, lines = steps * PANEL * 4 / LINE;
        // Meanwhile the piece that follows is fetched, a line per step: in one go if there is one block of rows only.
        const float* piece = weights + k * PANEL;
        const char* ahead = reinterpret_cast<const char*>(k + PIECE < depth ? piece + PIECE * PANEL : next);
        for (long first = 0, asked = 0; first < rows; first += BLOCK) {
            const long n = rows - first < BLOCK ? rows - first : BLOCK;
            const float* some = x + first * depth + k;
            float* to = sums + first * PANEL;
            if (rows <= BLOCK) {
                multiply_some<PANEL * 4 / LINE>(n, some, depth, steps, piece, ahead, to);
            } else if (asked < lines) {
                multiply_some<1>(n, some, depth, steps, piece, ahead + asked * LINE, to);
                asked += steps;
            } else {
                multiply_some<0>(n, some, depth, steps, piece, ahead, to);
            }
        }
    }
}

// Dot products of one row of x with rows of weights, four at a time. x: [depth].
inline void dots(const float* x, long depth, const float* weights, long count, float* results) {
    const float* row[4];
    for (int i = 0; i < 4; ++i) row[i] = weights + (i < count ? i : 0) * depth;
    Lanes sum[4][2] = {};
    long k = 0;
    for (; k + 2 * LANES <= depth; k += 2 * LANES)
        for (int half = 0; half < 2; ++half) {
            const Lanes input = load(x + k + half * LANES);
            for (int i = 0; i < 4; ++i) sum[i][half] += load(row[i] + k + half * LANES) * input;
        }
    for (int i = 0; i < count; ++i) {
        float rest = 0;
        for (long j = k; j < depth; ++j) rest += row[i][j] * x[j];
        results[i] = total(sum[i][0] + sum[i][1]) + rest;
    }
}

// One row and unordered weights: columns [from, from + count) of the output, count at most PANEL.
inline void row_of(const Matrix& matrix, const float* x, long from, long count, float* sums) {
    long part = 0, before = 0;
    for (long done = 0; done < count;) {
        while (from + done >= before + matrix.widths[part]) before += matrix.widths[part++];
        const long at = from + done - before, left = matrix.widths[part] - at;
        long n = count - done < 4 ? count - done : 4;
        n = n < left ? n : left;
        dots(x, matrix.depth, matrix.rows[part] + at * matrix.depth, n, sums + done);
        done += n;
    }
}

// The panel that a worker will probably take next, or where its next phase begins.
inline const float* next_panel(const Worker& worker, const Matrix& matrix, long panel, const float* after) {
    const long ahead = panel + worker.size();
    if (ahead < panels_of(matrix.width)) return matrix.panels + ahead * matrix.depth * PANEL;
    return after ? after : matrix.panels;
}

// A panel's width of numbers at a time: the compiler is told that it is whole where it is.
inline void increase(float* to, const float* by, long count) {
    if (count == PANEL)
        for (int c = 0; c < PANEL; c += LANES) store(to + c, load(to + c) + load(by + c));
    else
        for (long c = 0; c < count; ++c) to[c] += by[c];
}

inline void copy(const float* from, float* to, long count) {
    if (count == PANEL)
        for (int c = 0; c < PANEL; c += LANES) store(to + c, load(from + c));
    else
        std::memcpy(to, from, count * 4);
}

// out [row, width] = x [row, depth] W^T + bias (+ out, + added): the pieces that this worker takes. after: what is read once all are done.
void linear(
    Worker& worker, const Matrix& matrix, long rows, const float* x, float* out, bool onto, const float* added, const float* after) {
    const long n_panels = panels_of(matrix.width);
    std::vector<float> sums(rows * PANEL);
    for (long panel; (panel = worker.take()) < n_panels;) {
        const long from = panel * PANEL, count = matrix.width - from < PANEL ? matrix.width - from : PANEL;
        if (matrix.panels)
            panel_of(matrix, rows, x, panel, next_panel(worker, matrix, panel, after), sums.data());
        else
            row_of(matrix, x, from, count, sums.data());
        for (long r = 0; r < rows; ++r) {
            float *to = out + r * matrix.width + from, *sum = &sums[r * PANEL];
            if (matrix.bias) increase(sum, matrix.bias + from, count);
            if (onto) increase(sum, to, count);
            if (added) increase(sum, added + r * matrix.width + from, count);
            copy(sum, to, count);
        }
    }
}

// silu(gate) * up, [row, d_mlp]
void gate_up(Worker& worker, const Matrix& gate, const Matrix& up, long rows, const float* x, float* out, const float* after) {
    const long n_panels = panels_of(gate.width), width = gate.width;
    std::vector<float> gates(rows * PANEL), ups(rows * PANEL);
    for (long panel; (panel = worker.take()) < n_panels;) {
        const long from = panel * PANEL, count = width - from < PANEL ? width - from : PANEL;
        if (gate.panels) {
            panel_of(gate, rows, x, panel, up.panels + panel * up.depth * PANEL, gates.data());
            panel_of(up, rows, x, panel, next_panel(worker, gate, panel, after), ups.data());
        } else {
            row_of(gate, x, from, count, gates.data());
            row_of(up, x, from, count, ups.data());
        }
        for (long r = 0; r < rows; ++r) {
            float *opened = &gates[r * PANEL], *value = &ups[r * PANEL];
            if (gate.bias) increase(opened, gate.bias + from, count);
            if (up.bias) increase(value, up.bias + from, count);
            for (int c = 0; c < PANEL; c += LANES) store(value + c, gated(load(opened + c), load(value + c)));
            copy(value, out + r * width + from, count);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- norms, attention

void norm(Worker& worker, long rows, long width, const float* x, const float* weight, float epsilon, float* out) {
    for (long row; (row = worker.take()) < rows;) {
        const float* from = x + row * width;
        float* to = out + row * width;
        Lanes sum = {};
        long k = 0;
        for (; k + LANES <= width; k += LANES) sum += load(from + k) * load(from + k);
        float square = total(sum);
        for (; k < width; ++k) square += from[k] * from[k];
        const float factor = 1.f / std::sqrt(square / width + epsilon);
        for (k = 0; k < width; ++k) to[k] = from[k] * factor * weight[k];
    }
}

inline void rotate(float* head, const float* cosines, const float* sines, long size, float* room) {
    std::memcpy(room, head, size * 4);
    const long half = size / 2;
    for (long d = 0; d < half; ++d) head[d] = room[d] * cosines[d] + room[d + half] * sines[d];
    for (long d = half; d < size; ++d) head[d] = room[d] * cosines[d] + room[d - half] * sines[d];
}

// Softmax in place over n scores; the room behind them is filled up to whole vectors.
inline void soften(float* scores, long n) {
    float most = scores[0];
    for (long i = 1; i < n; ++i) most = scores[i] > most ? scores[i] : most;
    for (long i = n; i % LANES; ++i) scores[i] = -1e30f;
    Lanes sum = {};
    for (long i = 0; i < n; i += LANES) {
        const Lanes value = exponential(load(scores + i) - most);
        store(scores + i, value);
        sum += value;
    }
    const float factor = 1.f / total(sum);
    for (long i = 0; i < n; ++i) scores[i] *= factor;
}

// Scores [G, room] of G queries [G, size] with n keys, scaled; what is written behind the n-th has no meaning.
template <int G> void compare(const float* queries, const float* keys, long n, long size, float scale, float* scores, long room) {
    for (long first = 0; first < n; first += LANES) {
        Lanes sum[G][LANES] = {};
        const long count = n - first < LANES ? n - first : LANES, whole = size / LANES * LANES;
        for (long i = 0; i < count; ++i) {
            const float* key = keys + (first + i) * size;
            Lanes products[G] = {};
            for (long d = 0; d < whole; d += LANES) {
                const Lanes part = load(key + d);
                __builtin_prefetch(key + d + AHEAD, 0, 2);
                for (int g = 0; g < G; ++g) products[g] += part * load(queries + g * size + d);
            }
            for (int g = 0; g < G; ++g) sum[g][i] = products[g];
        }
        for (int g = 0; g < G; ++g) {
            float* to = scores + g * room + first;
            store(to, totals(sum[g]) * scale);
            for (long rest = whole; rest < size; ++rest)
                for (long i = 0; i < count; ++i) to[i] += scale * keys[(first + i) * size + rest] * queries[g * size + rest];
        }
    }
}

// out [G, size]: values [n, size] weighted with scores [G, room].
template <int G> void blend(const float* scores, long room, const float* values, long n, long size, float* out) {
    long d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) {
        Lanes sum[G][4] = {};
        for (long at = 0; at < n; ++at) {
            for (int c = 0; c < 4; ++c) {
                const Lanes part = load(values + at * size + d + c * LANES);
                __builtin_prefetch(values + at * size + d + c * LANES + AHEAD, 0, 2);
                for (int g = 0; g < G; ++g) sum[g][c] += part * scores[g * room + at];
            }
        }
        for (int g = 0; g < G; ++g)
            for (int c = 0; c < 4; ++c) store(out + g * size + d + c * LANES, sum[g][c]);
    }
    for (; d < size; ++d)
        for (int g = 0; g < G; ++g) {
            float sum = 0;
            for (long at = 0; at < n; ++at) sum += values[at * size + d] * scores[g * room + at];
            out[g * size + d] = sum;
        }
}

// Attention of G queries [G, size] over n positions. scores: room for [G, room].
template <int G>
void attend(
    const float* queries, const float* keys, const float* values, long n, long size, float scale, float* scores, long room, float* out) {
    compare<G>(queries, keys, n, size, scale, scores, room);
    for (int g = 0; g < G; ++g) soften(scores + g * room, n);
    blend<G>(scores, room, values, n, size, out);
}

// A group of queries, of whatever size.
void attend_all(
    long group, const float* queries, const float* keys, const float* values, long n, long size, float scale, float* scores, long room,
    float* out) {
    for (; group > 0; group -= 4, queries += 4 * size, out += 4 * size) {
        switch (group) {
            case 1: attend<1>(queries, keys, values, n, size, scale, scores, room, out); break;
            case 2: attend<2>(queries, keys, values, n, size, scale, scores, room, out); break;
            case 3: attend<3>(queries, keys, values, n, size, scale, scores, room, out); break;
            default: attend<4>(queries, keys, values, n, size, scale, scores, room, out);
        }
    }
}

// qkv: [row, query, key and value heads]; out: [row, heads * d_head].
void attention(Worker& worker, const Model& model, const Batch& batch, long layer, float* qkv, float* out) {
    const long size = model.d_head, group = model.heads / model.kv_heads, all_heads = model.heads + 2 * model.kv_heads;
    long room = 0;
    for (long row = 0; row < batch.rows; ++row) room = batch.ends[row] > room ? batch.ends[row] : room;
    room += LANES;
    std::vector<float> scratch(size + 4 * room);
    float* scores = scratch.data() + size;
    for (long task; (task = worker.take()) < batch.rows * model.kv_heads;) {
        const long row = task / model.kv_heads, head = task % model.kv_heads;
        const float *cosines = batch.cosines + row * size, *sines = batch.sines + row * size;
        float* heads = qkv + row * all_heads * size;
        float *key = heads + (model.heads + head) * size, *value = key + model.kv_heads * size;
        float* keys = batch.cache + layer * batch.layer_stride + row * batch.row_stride + head * batch.head_stride;
        float* values = keys + batch.kind_stride;
        rotate(key, cosines, sines, size, scratch.data());
        const long begin = batch.begins[row], end = batch.ends[row], n = end - begin;
        std::memcpy(keys + (end - 1) * size, key, size * 4);
        std::memcpy(values + (end - 1) * size, value, size * 4);
        keys += begin * size, values += begin * size;
        float* queries = heads + head * group * size;
        float* to = out + (row * model.heads + head * group) * size;
        for (long member = 0; member < group; ++member) rotate(queries + member * size, cosines, sines, size, scratch.data());
        attend_all(group, queries, keys, values, n, size, model.scale, scores, room, to);
    }
}

// Prompts as paths [path, width] through the nodes of a prefix tree: a path's own nodes are those from `begins` on, up to its length.
struct Prompts {
    const int64_t* paths;
    int64_t count, width;
    const int64_t *begins, *lengths;
};

// Causal attention within prompts. queries: of the nodes from `first` on, each `row` numbers behind the one before; keys, values: of all
// nodes, each `step` behind the one before; heads lie side by side. out: [node from `first` on, heads * size].
void within(
    Worker& worker, const Prompts& prompts, long heads, long kv_heads, long size, const float* queries, long first, long row,
    const float* keys, const float* values, long step, float scale, float* out) {
    const long group = heads / kv_heads, room = prompts.width + LANES;
    std::vector<float> own_keys(prompts.width * size), own_values(prompts.width * size), scores(4 * room);
    for (long task; (task = worker.take()) < prompts.count * kv_heads;) {
        const long path = task / kv_heads, head = task % kv_heads, length = prompts.lengths[path];
        const int64_t* nodes = prompts.paths + path * prompts.width;
        for (long at = 0; at < length; ++at) {
            std::memcpy(&own_keys[at * size], keys + nodes[at] * step + head * size, size * 4);
            std::memcpy(&own_values[at * size], values + nodes[at] * step + head * size, size * 4);
        }
        for (long at = prompts.begins[path]; at < length; ++at) {
            const float* from = queries + (nodes[at] - first) * row + head * group * size;
            float* to = out + ((nodes[at] - first) * heads + head * group) * size;
            attend_all(group, from, own_keys.data(), own_values.data(), at + 1, size, scale, scores.data(), room, to);
        }
    }
}

// What follows attention in a layer. added: what is added after attention and after the MLP, [row, d_model] or nothing; following: the
// panels that are read next.
void rest(
    Worker& worker, const Model& model, const Layer& layer, long rows, const float* z, float* hidden, const float* const* added,
    float* normed, float* inner, const float* following) {
    linear(worker, layer.o, rows, z, hidden, true, added[0], layer.gate.panels);
    worker.meet();
    norm(worker, rows, model.d_model, hidden, layer.norm2, model.epsilon, normed);
    worker.meet();
    gate_up(worker, layer.gate, layer.up, rows, normed, inner, layer.down.panels);
    worker.meet();
    linear(worker, layer.down, rows, inner, hidden, true, added[1], following);
    worker.meet();
}

}  // namespace

extern "C" {

int64_t emosteer_panel() { return PANEL; }

// weights [width, depth] -> panels [panel, depth, PANEL], of which the columns [from, from + width) are written.
void emosteer_pack(const float* weights, int64_t width, int64_t depth, int64_t from, float* panels, int64_t threads) {
    const long first = from / PANEL, last = panels_of(from + width);
    Team::run(threads, [&](Worker worker) {
        for (long panel; (panel = first + worker.take()) < last;)
            for (long begin = 0; begin < depth; begin += 16)  // a line of every row at a time
                for (long column = 0; column < PANEL; ++column) {
                    const long row = panel * PANEL + column - from, end = begin + 16 < depth ? begin + 16 : depth;
                    float* to = panels + panel * depth * PANEL + column;
                    if (row < 0) continue;
                    for (long k = begin; k < end; ++k) to[k * PANEL] = row < width ? weights[row * depth + k] : 0.f;
                }
        worker.meet();
    });
}

// out [row, width] = x [row, depth] W^T + bias
void emosteer_linear(const Matrix* matrix, const float* x, int64_t rows, float* out, int64_t threads) {
    Team::run(threads, [&](Worker worker) {
        linear(worker, *matrix, rows, x, out, false, nullptr, nullptr);
        worker.meet();
    });
}

// out [row, width] = x / root mean square of x * weight
void emosteer_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* out, int64_t threads) {
    Team::run(threads, [&](Worker worker) {
        norm(worker, rows, width, x, weight, epsilon, out);
        worker.meet();
    });
}

// gate = silu(gate) * up, in place, [row, width]
void emosteer_gate(float* gate, const float* up, int64_t rows, int64_t width, int64_t threads) {
    Team::run(threads, [&](Worker worker) {
        for (long row; (row = worker.take()) < rows;) {
            float* to = gate + row * width;
            const float* by = up + row * width;
            long k = 0;
            for (; k + LANES <= width; k += LANES) store(to + k, gated(load(to + k), load(by + k)));
            for (; k < width; ++k) to[k] = to[k] / (1.f + std::exp(-to[k])) * by[k];
        }
        worker.meet();
    });
}

// Rotates the first `count` of `heads` heads [row, heads, size] in place. cosines, sines: [row, size].
void emosteer_rotate(
    float* states, const float* cosines, const float* sines, int64_t rows, int64_t heads, int64_t count, int64_t size, int64_t threads) {
    Team::run(threads, [&](Worker worker) {
        std::vector<float> room(size);
        for (long row; (row = worker.take()) < rows;)
            for (long head = 0; head < count; ++head)
                rotate(states + (row * heads + head) * size, cosines + row * size, sines + row * size, size, room.data());
        worker.meet();
    });
}

// Attention within prompts that share their beginnings. qkv: [node, query, key and value heads], rotated; out: [node, heads * d_head].
void emosteer_read(
    const float* qkv, int64_t heads, int64_t kv_heads, int64_t size, const int64_t* paths, int64_t n_paths, int64_t width,
    const int64_t* begins, const int64_t* lengths, float scale, float* out, int64_t threads) {
    const Prompts prompts = {paths, n_paths, width, begins, lengths};
    const long row = (heads + 2 * kv_heads) * size;
    const float *keys = qkv + heads * size, *values = keys + kv_heads * size;
    Team::run(threads, [&](Worker worker) {
        within(worker, prompts, heads, kv_heads, size, qkv, 0, row, keys, values, row, scale, out);
        worker.meet();
    });
}

// Keys and values of the nodes of prompts that share their beginnings: states [layer, key or value, node, kv heads, d_head], in which those
// of the first `known` nodes stand already. hidden: [node after those, d_model], overwritten. cosines, sines: [node after those, d_head].
void emosteer_prompts(
    const Model* model, float* hidden, const float* cosines, const float* sines, int64_t nodes, int64_t known, const int64_t* paths,
    int64_t n_paths, int64_t width, const int64_t* begins, const int64_t* lengths, float* states, int64_t threads) {
    const Prompts prompts = {paths, n_paths, width, begins, lengths};
    const long rows = nodes - known, size = model->d_head, all_heads = model->heads + 2 * model->kv_heads;
    const long row = all_heads * size, kept = model->kv_heads * size, each = nodes * kept;
    std::vector<float> normed(rows * model->d_model), qkv(rows * row), inner(rows * model->d_mlp), z(rows * model->heads * size);
    const float* const added[2] = {nullptr, nullptr};
    Team::run(threads, [&](Worker worker) {
        std::vector<float> room(size);
        for (long index = 0; index < model->layers; ++index) {
            const Layer& layer = model->layer[index];
            float *keys = states + 2 * index * each, *values = keys + each;
            norm(worker, rows, model->d_model, hidden, layer.norm1, model->epsilon, normed.data());
            worker.meet();
            linear(worker, layer.qkv, rows, normed.data(), qkv.data(), false, nullptr, layer.o.panels);
            worker.meet();
            for (long at; (at = worker.take()) < rows;) {
                float* heads = qkv.data() + at * row;
                for (long head = 0; head < model->heads + model->kv_heads; ++head)
                    rotate(heads + head * size, cosines + at * size, sines + at * size, size, room.data());
                std::memcpy(keys + (known + at) * kept, heads + model->heads * size, kept * 4);
                std::memcpy(values + (known + at) * kept, heads + (model->heads + model->kv_heads) * size, kept * 4);
            }
            worker.meet();
            if (index + 1 == model->layers) break;  // the last layer's output is not needed
            within(
                worker, prompts, model->heads, model->kv_heads, size, qkv.data(), known, row, keys, values, kept, model->scale, z.data());
            worker.meet();
            const float* following = model->layer[index + 1].qkv.panels;
            rest(worker, *model, layer, rows, z.data(), hidden, added, normed.data(), inner.data(), following);
        }
    });
}

void emosteer_step(const Model* model, const Batch* batch) {
    const long rows = batch->rows, width = model->d_model;
    std::vector<float> normed(rows * width), qkv(rows * (model->heads + 2 * model->kv_heads) * model->d_head);
    std::vector<float> z(rows * model->heads * model->d_head), inner(rows * model->d_mlp);
    Team::run(batch->threads, [&](Worker worker) {
        for (long index = 0; index < model->layers; ++index) {
            const Layer& layer = model->layer[index];
            const float* following = index + 1 < model->layers ? model->layer[index + 1].qkv.panels : nullptr;
            norm(worker, rows, width, batch->hidden, layer.norm1, model->epsilon, normed.data());
            worker.meet();
            linear(worker, layer.qkv, rows, normed.data(), qkv.data(), false, nullptr, layer.o.panels);
            worker.meet();
            attention(worker, *model, *batch, index, qkv.data(), z.data());
            worker.meet();
            rest(worker, *model, layer, rows, z.data(), batch->hidden, batch->added + 2 * index, normed.data(), inner.data(), following);
        }
        norm(worker, rows, width, batch->hidden, model->norm, model->epsilon_last, normed.data());
        worker.meet();
    });
    std::memcpy(batch->hidden, normed.data(), normed.size() * 4);
}
}
