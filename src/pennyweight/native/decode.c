/* One token through all layers of a decoder with rotary positions, grouped queries and a gated feed-forward net.
 *
 * One parallel region a token: threads share the rows of each matrix and the heads, and meet five times a layer. What
 * is short (norms, the residual stream) every thread computes for itself, which costs less than meeting once more.
 */
#include "products.h"
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

/* A factor of a map. Offsets are in the scratch numbers; -1 is the map's input, or its output, to which is added. */
typedef struct {
    const Matrix *matrix;
    int64_t from, to;
} Part;

typedef struct {
    const Part *parts;
    int64_t count;
    const float *bias; /* or NULL */
} Map;

typedef struct {
    int64_t heads, groups, inner; /* query heads, key-value heads, width of the feed-forward net */
    Map query, key, value, output, gate, up, down;
    const float *before, *between;       /* (width) weights of the norms */
    const float *query_norm, *key_norm;  /* (size), or NULL */
    void *keys, *values;                 /* (groups, context, size) */
} Layer;

typedef struct {
    int64_t layers, width, size, context; /* size: of a head */
    int64_t widest, scratch; /* the most numbers of an input or output, and what maps of several parts keep */
    int64_t brain;           /* whether keys and values are bfloat16, not float32 */
    float epsilon, scaling;
    const float *cosine, *sine; /* (context, size) */
    const float *norm;          /* (width) */
    const Layer *layer;
} Network;

typedef struct {
    atomic_int arrived, turn;
} Gate;

/* What a thread has for itself. */
typedef struct {
    Gate *gate;
    int index, count;
    float *residual, *input, *held, *part, *scores, *head;
    uint8_t *codes;
} Thread;

static void meet(const Thread *me)
{
    Gate *gate = me->gate;
    const int turn = atomic_load(&gate->turn);
    if (atomic_fetch_add(&gate->arrived, 1) == me->count - 1) {
        atomic_store(&gate->arrived, 0);
        atomic_store(&gate->turn, turn + 1);
        return;
    }
    for (int spins = 0; atomic_load(&gate->turn) == turn; spins++) {
        if (spins > 20000) {
            sched_yield(); /* somebody else has its core */
            continue;
        }
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
}

static void normalized(const float *x, const float *weight, float epsilon, int n, float *y)
{
    float sum = 0;
    for (int j = 0; j < n; j++)
        sum += x[j] * x[j];
    const float by = 1 / sqrtf(sum / n + epsilon);
    for (int j = 0; j < n; j++)
        y[j] = weight[j] * (x[j] * by);
}

/* The rows of this thread, in whole strips of four. */
static void mine(const Thread *me, int m, int *from, int *to)
{
    const int strip = ((m + me->count - 1) / me->count + 3) / 4 * 4;
    *from = me->index * strip < m ? me->index * strip : m;
    *to = *from + strip < m ? *from + strip : m;
}

/* The rows of y = W x + bias that are this thread's; y is complete once the threads have met. */
static void mapped(const Thread *me, const Map *map, const float *x, float *scratch, float *y)
{
    int from = 0, to = 0, first = 1;
    for (int64_t p = 0; p < map->count; p++) {
        const Part *part = map->parts + p;
        const Matrix *a = part->matrix;
        const float *in = x;
        if (part->from >= 0) {
            meet(me);
            in = scratch + part->from;
        }
        prepare(a, in, me->held);
        mine(me, a->m, &from, &to);
        if (part->to >= 0) {
            rows(a, in, me->held, me->codes, from, to, scratch + part->to);
        } else if (first) {
            rows(a, in, me->held, me->codes, from, to, y);
            first = 0;
        } else {
            rows(a, in, me->held, me->codes, from, to, me->part);
            for (int i = from; i < to; i++)
                y[i] += me->part[i];
        }
    }
    if (map->bias) /* the last part is the output's, and so are its rows */
        for (int i = from; i < to; i++)
            y[i] += map->bias[i];
}

/* A head at its position: normalized where the model does so, and turned. */
static void placed(const Network *net, const float *x, const float *weight, int position, float *normal, float *y)
{
    const int size = net->size, half = size / 2;
    const float *cosine = net->cosine + (int64_t)position * size, *sine = net->sine + (int64_t)position * size;
    if (weight) {
        normalized(x, weight, net->epsilon, size, normal);
        x = normal;
    }
    for (int j = 0; j < half; j++) {
        y[j] = x[j] * cosine[j] - x[j + half] * sine[j];
        y[j + half] = x[j + half] * cosine[j + half] + x[j] * sine[j + half];
    }
}

static float dot(const Network *net, const void *keys, int64_t at, const float *query)
{
    return net->brain ? dot_bf16((const uint16_t *)keys + at, query, net->size)
                      : dot_f32((const float *)keys + at, query, net->size);
}

static void weighted(const Network *net, const void *values, int64_t at, float by, float *y)
{
    if (net->brain)
        for (int j = 0; j < net->size; j++)
            y[j] += by * brain(((const uint16_t *)values)[at + j]);
    else
        for (int j = 0; j < net->size; j++)
            y[j] += by * ((const float *)values)[at + j];
}

static void keep(const Network *net, void *all, int64_t at, const float *x)
{
    if (net->brain)
        for (int j = 0; j < net->size; j++)
            ((uint16_t *)all)[at + j] = to_brain(x[j]);
    else
        memcpy((float *)all + at, x, sizeof(float) * net->size);
}

/* One query head over all keys until now; the first head of a group also keeps its key and value. */
static void attended(const Thread *me, const Network *net, const Layer *layer, int head, int position,
                     const float *queries, const float *keys, const float *values, float *y)
{
    const int size = net->size, per = layer->heads / layer->groups, group = head / per;
    float *query = me->head, *key = query + size, *value = key + size, *normal = value + size;
    placed(net, queries + head * size, layer->query_norm, position, normal, query);
    placed(net, keys + group * size, layer->key_norm, position, normal, key);
    memcpy(value, values + group * size, sizeof(float) * size);
    if (net->brain)
        for (int j = 0; j < size; j++) {
            key[j] = brain(to_brain(key[j]));
            value[j] = brain(to_brain(value[j]));
        }
    const int64_t start = (int64_t)group * net->context * size;
    float top = me->scores[position] = net->scaling * dot_f32(key, query, size), sum = 0;
    for (int t = 0; t < position; t++) {
        me->scores[t] = net->scaling * dot(net, layer->keys, start + (int64_t)t * size, query);
        top = me->scores[t] > top ? me->scores[t] : top;
    }
    for (int t = 0; t <= position; t++)
        sum += me->scores[t] = exponential(me->scores[t] - top);
    for (int j = 0; j < size; j++)
        y[j] = me->scores[position] * value[j];
    for (int t = 0; t < position; t++)
        weighted(net, layer->values, start + (int64_t)t * size, me->scores[t], y);
    for (int j = 0; j < size; j++)
        y[j] /= sum;
    if (head % per == 0) {
        keep(net, layer->keys, start + (int64_t)position * size, key);
        keep(net, layer->values, start + (int64_t)position * size, value);
    }
}

static void added(float *x, const float *y, int n)
{
    for (int j = 0; j < n; j++)
        x[j] += y[j];
}

static void one_layer(const Thread *me, const Network *net, const Layer *layer, int position, float *shared)
{
    const int width = net->width, size = net->size;
    float *queries = shared, *keys = queries + net->widest, *values = keys + net->widest;
    float *attention = values + net->widest, *first = attention + net->widest, *second = first + net->widest;
    float *inner = second + net->widest, *gated = inner + net->widest, *scratch = gated + net->widest;

    normalized(me->residual, layer->before, net->epsilon, width, me->input);
    mapped(me, &layer->query, me->input, scratch, queries);
    mapped(me, &layer->key, me->input, scratch, keys);
    mapped(me, &layer->value, me->input, scratch, values);
    meet(me);
    for (int head = me->index; head < layer->heads; head += me->count)
        attended(me, net, layer, head, position, queries, keys, values, attention + head * size);
    meet(me);
    mapped(me, &layer->output, attention, scratch, first);
    meet(me);
    added(me->residual, first, width);
    normalized(me->residual, layer->between, net->epsilon, width, me->input);
    mapped(me, &layer->gate, me->input, scratch, gated);
    mapped(me, &layer->up, me->input, scratch, inner);
    int from, to;
    mine(me, layer->inner, &from, &to); /* those rows of both are this thread's own */
    for (int i = from; i < to; i++)
        inner[i] *= gated[i] / (1 + exponential(-gated[i]));
    meet(me);
    mapped(me, &layer->down, inner, scratch, second);
    meet(me);
    added(me->residual, second, width);
}

/* x (width): a token's embedding in, the normalized hidden state out. Returns 0, or 1 when memory ran out. */
int decode(const Network *net, float *x, int position, int threads)
{
    const size_t widest = net->widest, common = 8 * widest + net->scratch;
    const size_t own = net->width + widest + room(widest) + widest + position + 1 + 4 * net->size + widest / 4 + 4;
    float *all = malloc(sizeof(float) * (common + own * threads));
    if (!all)
        return 1;
    Gate gate;
    atomic_init(&gate.arrived, 0);
    atomic_init(&gate.turn, 0);
#pragma omp parallel num_threads(threads)
    {
        Thread me = {.gate = &gate, .index = omp_get_thread_num(), .count = omp_get_num_threads()};
        me.residual = all + common + own * me.index;
        me.input = me.residual + net->width;
        me.held = me.input + widest;
        me.part = me.held + room(widest);
        me.scores = me.part + widest;
        me.head = me.scores + position + 1;
        me.codes = (uint8_t *)(me.head + 4 * net->size);
        memcpy(me.residual, x, sizeof(float) * net->width);
        for (int64_t layer = 0; layer < net->layers; layer++)
            one_layer(&me, net, net->layer + layer, position, all);
        meet(&me); /* x is read by all before one of them writes it */
        if (me.index == 0)
            normalized(me.residual, net->norm, net->epsilon, net->width, x);
    }
    free(all);
    return 0;
}
