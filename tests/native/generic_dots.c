// The dot products of ggml's *_generic functions, told anew: what matmul(order="generic") must equal bit for bit.
// Built with -ffp-contract=off, so that every operation rounds. Each takes n weights and n activations as blocks.

#include <stdint.h>
#include <string.h>

static float half(const uint8_t *p) {
    const uint32_t h = p[0] | p[1] << 8, sign = (h >> 15) << 31, e = h >> 10 & 31, m = h & 1023;
    if (e == 0) {
        const float tiny = (float)m * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    const uint32_t bits = sign | (e == 31 ? 255u : e + 112) << 23 | m << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static float single(const uint8_t *p) {
    float f;
    memcpy(&f, p, 4);
    return f;
}

// sum of codes times activations over 32 weights
static int dot32(const int8_t *w, const uint8_t *a) {
    int sum = 0;
    for (int i = 0; i < 32; i++) sum += w[i] * (int8_t)a[i];
    return sum;
}

float dot_q8_0(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 32; b++, w += 34, a += 34)
        sum += dot32((const int8_t *)w + 2, a + 2) * (half(w) * half(a));
    return sum;
}

float dot_q5_0(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 32; b++, w += 22, a += 34) {
        int8_t q[32];
        for (int i = 0; i < 32; i++) {
            const int low = i < 16 ? w[6 + i] & 15 : w[6 + i - 16] >> 4, high = w[2 + i / 8] >> i % 8 & 1;
            q[i] = (int8_t)((low | high << 4) - 16);
        }
        sum += (half(w) * half(a)) * dot32(q, a + 2);
    }
    return sum;
}

// lane[l] += d * (sum over the codes l, l + 8, ... of the block of scale * code * activation)
static void add_lanes(float *lane, float d, const int8_t *q, const int *scale, int per_scale, const uint8_t *a) {
    for (int l = 0; l < 8; l++) {
        int sum = 0;
        for (int i = l; i < 256; i += 8) sum += scale[i / per_scale] * (q[i] * (int8_t)a[i]);
        lane[l] += d * sum;
    }
}

static float add_up(float sum, const float *lane) {
    for (int l = 0; l < 8; l++) sum += lane[l];
    return sum;
}

static int bsum(const uint8_t *a, int group) {
    return (int16_t)(a[260 + 2 * group] | a[261 + 2 * group] << 8);
}

static void six_bits(const uint8_t *s, int *scale, int *least) {
    for (int j = 0; j < 4; j++) {
        scale[j] = s[j] & 63;
        least[j] = s[j + 4] & 63;
        scale[j + 4] = (s[j + 8] & 15) | (s[j] >> 6) << 4;
        least[j + 4] = s[j + 8] >> 4 | (s[j + 4] >> 6) << 4;
    }
}

float dot_q4_k(int n, const uint8_t *w, const uint8_t *a) {
    float lane[8] = {0}, sum = 0;
    for (int b = 0; b < n / 256; b++, w += 144, a += 292) {
        int scale[8], least[8], mins = 0;
        int8_t q[256];
        six_bits(w + 4, scale, least);
        for (int i = 0; i < 256; i++) q[i] = w[16 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        for (int g = 0; g < 16; g++) mins += least[g / 2] * bsum(a, g);
        add_lanes(lane, half(w) * single(a), q, scale, 32, a + 4);
        sum -= half(w + 2) * single(a) * mins;
    }
    return add_up(sum, lane);
}

float dot_q6_k(int n, const uint8_t *w, const uint8_t *a) {
    float lane[8] = {0};
    for (int b = 0; b < n / 256; b++, w += 210, a += 292) {
        int scale[16];
        int8_t q[256];
        for (int i = 0; i < 256; i++) {
            const int h = i / 128, k = i / 32 % 4, l = i % 32;
            const int low = w[h * 64 + k % 2 * 32 + l] >> (k / 2 * 4) & 15, high = w[128 + h * 32 + l] >> 2 * k & 3;
            q[i] = (int8_t)((low | high << 4) - 32);
        }
        for (int j = 0; j < 16; j++) scale[j] = (int8_t)w[192 + j];
        add_lanes(lane, half(w + 208) * single(a), q, scale, 16, a + 4);
    }
    return add_up(0, lane);
}

static void nibbles(const uint8_t *qs, int8_t *q, int less) {
    for (int i = 0; i < 16; i++) {
        q[i] = (int8_t)((qs[i] & 15) - less);
        q[i + 16] = (int8_t)((qs[i] >> 4) - less);
    }
}

float dot_q4_0(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 32; b++, w += 18, a += 34) {
        int8_t q[32];
        nibbles(w + 2, q, 8);
        sum += dot32(q, a + 2) * half(w) * half(a);
    }
    return sum;
}

float dot_q4_1(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 32; b++, w += 20, a += 36) {
        int8_t q[32];
        nibbles(w + 4, q, 0);
        sum += (half(w) * half(a)) * dot32(q, a + 4) + half(w + 2) * half(a + 2);
    }
    return sum;
}

float dot_q5_1(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 32; b++, w += 24, a += 36) {
        int8_t q[32];
        nibbles(w + 8, q, 0);
        for (int i = 0; i < 32; i++) q[i] |= (w[4 + i / 8] >> i % 8 & 1) << 4;
        sum += (half(w) * half(a)) * dot32(q, a + 4) + half(w + 2) * half(a + 2);
    }
    return sum;
}

float dot_q2_k(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 84, a += 292) {
        int total = 0, mins = 0;
        for (int g = 0; g < 16; g++) {
            int part = 0;
            for (int i = 16 * g; i < 16 * g + 16; i++)
                part += (w[16 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3) * (int8_t)a[4 + i];
            total += (w[g] & 15) * part;
            mins += (w[g] >> 4) * bsum(a, g);
        }
        sum += single(a) * half(w + 80) * total - single(a) * half(w + 82) * mins;
    }
    return sum;
}

float dot_q3_k(int n, const uint8_t *w, const uint8_t *a) {
    float lane[8] = {0};
    for (int b = 0; b < n / 256; b++, w += 110, a += 292) {
        int scale[16];
        int8_t q[256];
        for (int i = 0; i < 256; i++) {
            const int low = w[32 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3, high = w[i % 32] >> i / 32 & 1;
            q[i] = (int8_t)((low | high << 2) - 4);
        }
        for (int j = 0; j < 16; j++)
            scale[j] = ((w[96 + j % 8] >> j / 8 * 4 & 15) | (w[104 + j % 4] >> j / 4 * 2 & 3) << 4) - 32;
        add_lanes(lane, half(w + 108) * single(a), q, scale, 16, a + 4);
    }
    return add_up(0, lane);
}

float dot_q5_k(int n, const uint8_t *w, const uint8_t *a) {
    float lane[8] = {0}, sum = 0;
    for (int b = 0; b < n / 256; b++, w += 176, a += 292) {
        int scale[8], least[8], mins = 0;
        int8_t q[256];
        six_bits(w + 4, scale, least);
        for (int i = 0; i < 256; i++) {
            const int low = w[48 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15, high = w[16 + i % 32] >> i / 32 & 1;
            q[i] = (int8_t)(low | high << 4);
        }
        for (int g = 0; g < 16; g++) mins += least[g / 2] * bsum(a, g);
        add_lanes(lane, half(w) * single(a), q, scale, 32, a + 4);
        sum -= half(w + 2) * single(a) * mins;
    }
    return add_up(sum, lane);
}

static const int8_t IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t FP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static void levels(const uint8_t *qs, const int8_t *level, int bytes, int8_t *q) {
    for (int i = 0; i < bytes; i++) {
        q[i] = level[qs[i] & 15];
        q[i + bytes] = level[qs[i] >> 4];
    }
}

float dot_iq4_nl(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 32; b++, w += 18, a += 34) {
        int8_t q[32];
        levels(w + 2, IQ4, 16, q);
        sum += half(a) * half(w) * dot32(q, a + 2);
    }
    return sum;
}

float dot_mxfp4(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 32; b++, w += 17, a += 34) {
        const uint32_t bits = w[0] < 2 ? 0x200000u << w[0] : (uint32_t)(w[0] - 1) << 23;
        float d;
        int8_t q[32];
        memcpy(&d, &bits, 4);
        levels(w + 1, FP4, 16, q);
        sum += half(a) * d * dot32(q, a + 2);
    }
    return sum;
}

float dot_nvfp4(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 64; b++, w += 36, a += 68)
        for (int s = 0; s < 4; s++) {
            const int e = w[s] >> 3 & 15, m = w[s] & 7;
            float d = m * 0x1p-10f;
            const uint32_t bits = (uint32_t)(e + 119) << 23 | (uint32_t)m << 20;
            if (e) memcpy(&d, &bits, 4);
            if (w[s] == 0x7F) d = 0;
            int8_t q[16];
            int total = 0;
            levels(w + 4 + 8 * s, FP4, 8, q);
            for (int i = 0; i < 16; i++) total += q[i] * (int8_t)a[34 * (s / 2) + 2 + 16 * (s % 2) + i];
            sum += half(a + 34 * (s / 2)) * d * total;
        }
    return sum;
}

float dot_iq4_xs(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 136, a += 292)
        for (int s = 0; s < 8; s++) {
            const int low = w[4 + s / 2] >> s % 2 * 4 & 15, high = (w[2] | w[3] << 8) >> 2 * s & 3;
            int8_t q[32];
            levels(w + 8 + 16 * s, IQ4, 16, q);
            const float d = half(w) * single(a) * ((low | high << 4) - 32);
            sum += d * dot32(q, a + 4 + 32 * s);
        }
    return sum;
}

float dot_tq1_0(int n, const uint8_t *w, const uint8_t *a) {
    static const int power[5] = {1, 3, 9, 27, 81};
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 54, a += 292) {
        int total = 0;
        for (int i = 0; i < 256; i++) {
            int byte, k;
            if (i < 160) byte = i % 32, k = i / 32;
            else if (i < 240) byte = 32 + i % 16, k = (i - 160) / 16;
            else byte = 48 + i % 4, k = (i - 240) / 4;
            total += (((w[byte] * power[k] & 255) * 3 >> 8) - 1) * (int8_t)a[4 + i];
        }
        sum += (float)total * (half(w + 52) * single(a));
    }
    return sum;
}

float dot_tq2_0(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 66, a += 292) {
        int total = 0;
        for (int i = 0; i < 256; i++)
            total += ((w[i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3) - 1) * (int8_t)a[4 + i];
        sum += (float)total * (single(a) * half(w + 64));
    }
    return sum;
}

float dot_q1_0(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 128; b++, w += 18) {
        float part = 0;
        for (int k = 0; k < 4; k++, a += 34) {
            int8_t q[32];
            for (int i = 0; i < 32; i++) q[i] = w[2 + 4 * k + i / 8] >> i % 8 & 1 ? 1 : -1;
            part += half(a) * dot32(q, a + 2);
        }
        sum += half(w) * part;
    }
    return sum;
}

float dot_q2_0(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 64; b++, w += 18) {
        float part = 0;
        for (int k = 0; k < 2; k++, a += 34) {
            int8_t q[32];
            for (int i = 0; i < 32; i++) q[i] = (int8_t)((w[2 + 8 * k + i / 4] >> i % 4 * 2 & 3) - 1);
            part += half(a) * dot32(q, a + 2);
        }
        sum += half(w) * part;
    }
    return sum;
}

// The grids of the codebook types, lent by the test: points of 4 or 8 weights each
const int8_t *grid_iq2_xxs, *grid_iq2_xs, *grid_iq2_s, *grid_iq3_xxs, *grid_iq3_s, *grid_iq1_s;

// sum of a point of `size` weights times activations; bit i of signs: minus
static int dot_point(const int8_t *grid, int number, int size, int signs, const uint8_t *a) {
    int sum = 0;
    for (int i = 0; i < size; i++) sum += grid[number * size + i] * (int8_t)a[i] * (signs >> i & 1 ? -1 : 1);
    return sum;
}

// seven signs and an eighth that makes their number even
static int even(int signs) {
    int odd = 0;
    for (int i = 0; i < 7; i++) odd ^= signs >> i & 1;
    return signs | odd << 7;
}

static uint32_t word(const uint8_t *p) { return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24; }

float dot_iq2_xxs(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 66, a += 292) {
        int total = 0;
        for (int s = 0; s < 8; s++) {
            const uint32_t bits = word(w + 2 + 8 * s + 4);
            int part = 0;
            for (int k = 0; k < 4; k++)
                part += dot_point(grid_iq2_xxs, w[2 + 8 * s + k], 8, even(bits >> 7 * k & 127), a + 4 + 32 * s + 8 * k);
            total += (int)(2 * (bits >> 28) + 1) * part;
        }
        sum += half(w) * single(a) * total;
    }
    return 0.125f * sum;
}

float dot_iq2_xs(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 74, a += 292) {
        int total = 0;
        for (int k = 0; k < 32; k++) {
            const int bits = w[2 + 2 * k] | w[3 + 2 * k] << 8, level = w[66 + k / 4] >> k / 2 % 2 * 4 & 15;
            total += (2 * level + 1) * dot_point(grid_iq2_xs, bits & 511, 8, even(bits >> 9), a + 4 + 8 * k);
        }
        sum += half(w) * single(a) * total;
    }
    return 0.125f * sum;
}

float dot_iq2_s(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 82, a += 292) {
        int total = 0;
        for (int k = 0; k < 32; k++) {
            const int number = w[2 + k] | (w[66 + k / 4] >> k % 4 * 2 & 3) << 8, level = w[74 + k / 4] >> k / 2 % 2 * 4 & 15;
            total += (2 * level + 1) * dot_point(grid_iq2_s, number, 8, w[34 + k], a + 4 + 8 * k);
        }
        sum += half(w) * single(a) * total;
    }
    return 0.125f * sum;
}

float dot_iq3_xxs(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 98, a += 292) {
        int total = 0;
        for (int k = 0; k < 64; k++) {
            const uint32_t bits = word(w + 66 + k / 8 * 4);
            const int signs = even(bits >> k / 2 % 4 * 7 & 127) >> k % 2 * 4;
            total += (int)(2 * (bits >> 28) + 1) * dot_point(grid_iq3_xxs, w[2 + k], 4, signs, a + 4 + 4 * k);
        }
        sum += half(w) * single(a) * total;
    }
    return 0.25f * sum;
}

float dot_iq3_s(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 110, a += 292) {
        int total = 0;
        for (int k = 0; k < 64; k++) {
            const int number = w[2 + k] | (w[66 + k / 8] >> k % 8 & 1) << 8, level = w[106 + k / 16] >> k / 8 % 2 * 4 & 15;
            total += (2 * level + 1) * dot_point(grid_iq3_s, number, 4, w[74 + k / 2] >> k % 2 * 4, a + 4 + 4 * k);
        }
        sum += half(w) * single(a) * total;
    }
    return sum;
}

float dot_iq1_s(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 50, a += 292) {
        int points = 0, shifts = 0;
        for (int s = 0; s < 8; s++) {
            const int bits = w[34 + 2 * s] | w[35 + 2 * s] << 8, scale = 2 * (bits >> 12 & 7) + 1;
            for (int k = 0; k < 4; k++) {
                const int number = w[2 + 4 * s + k] | (bits >> 3 * k & 7) << 8;
                points += scale * dot_point(grid_iq1_s, number, 8, 0, a + 4 + 32 * s + 8 * k);
            }
            shifts += scale * (bits >> 15 ? -1 : 1) * (bsum(a, 2 * s) + bsum(a, 2 * s + 1));
        }
        sum += half(w) * single(a) * (points + 0.125f * shifts);
    }
    return sum;
}

float dot_iq1_m(int n, const uint8_t *w, const uint8_t *a) {
    float sum = 0;
    for (int b = 0; b < n / 256; b++, w += 56, a += 292) {
        const uint8_t *s = w + 48;
        const uint8_t d[2] = {(uint8_t)(s[1] >> 4 | (s[3] & 0xF0)), (uint8_t)(s[5] >> 4 | (s[7] & 0xF0))};
        int points = 0, shifts = 0;
        for (int k = 0; k < 32; k++) {
            const int four = w[32 + k / 2] >> k % 2 * 4 & 15, bits = s[k / 8 * 2] | s[k / 8 * 2 + 1] << 8;
            const int scale = 2 * (bits >> k / 2 % 4 * 3 & 7) + 1, number = w[k] | (four & 7) << 8;
            int eight = 0;
            for (int i = 0; i < 8; i++) eight += (int8_t)a[4 + 8 * k + i];
            points += scale * dot_point(grid_iq1_s, number, 8, 0, a + 4 + 8 * k);
            shifts += scale * (four & 8 ? -eight : eight);
        }
        sum += half(d) * single(a) * (points + 0.125f * shifts);
    }
    return sum;
}
