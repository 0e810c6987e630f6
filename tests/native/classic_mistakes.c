/* A small ggml-like library for tests/test_native.py: sound as it stands, and with -DMISTAKE=n wrong in one
   classic way. Blocks as in refimpl/quants/formats.py; float16 comes from the compiler. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { NONE, NIBBLES, UNSIGNED_SCALE, MIN_SIGN, NO_BSUMS, SKIP_LAST, SIX_BITS, CRASH, HANG, SPILL, SPILL_BEFORE,
       UNSIGNED_CODE, ROUNDING, SHORT_SUM, HIGH_BITS, WRITE_INPUT, SIZE, SIX_BITS_ODD, TABLE_OF_128, TRUNCATED };
#ifndef MISTAKE
#define MISTAKE NONE
#endif

typedef struct { _Float16 d, dmin; uint8_t scales[12], qs[128]; } q4_K;
typedef struct { uint8_t ql[128], qh[64]; int8_t scales[16]; _Float16 d; } q6_K;
typedef struct { _Float16 d; int8_t qs[32]; } q8_0;
typedef struct { _Float16 d; uint8_t qh[4], qs[16]; } q5_0;
typedef struct { float d; int8_t qs[256]; int16_t bsums[16]; } q8_K;

static void unpack(const uint8_t *s, int j, int *scale, int *min) {
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else if (MISTAKE == SIX_BITS) {
        *scale = s[j + 4] & 15;
        *min = s[j + 4] >> 4;
    } else if (MISTAKE == SIX_BITS_ODD) {
        *scale = (s[j + 4] & 15) | (s[j - 4] >> 7 << 4);
        *min = (s[j + 4] >> 4) | (s[j] >> 6 << 4);
    } else {
        *scale = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
        *min = (s[j + 4] >> 4) | (s[j] >> 6 << 4);
    }
}

static int code4(const uint8_t *qs, int i) { /* of weight i: two sub-blocks of 32 share 32 bytes */
    int high = i / 32 % 2;
    if (MISTAKE == NIBBLES) high = !high;
    return high ? qs[i / 64 * 32 + i % 32] >> 4 : qs[i / 64 * 32 + i % 32] & 15;
}

void dequantize_row_q4_K(const q4_K *x, float *y, int64_t n) {
    int64_t blocks = n / 256;
    if (MISTAKE == SKIP_LAST) blocks--;
    if (MISTAKE == SPILL) y[n + 2] = 1;
    if (MISTAKE == SPILL_BEFORE) y[-1] = 1;
    if (MISTAKE == WRITE_INPUT) ((q4_K *)x)->qs[0] ^= 1;
    for (int64_t b = 0; b < blocks; b++) {
        if (MISTAKE == CRASH && x[b].qs[7] == 0xEE) *(volatile int *)8 = 1;
        if (MISTAKE == HANG && x[b].qs[7] == 0xEE) for (volatile int on = 1; on;) { }
        if (MISTAKE == TABLE_OF_128 && b >= 128) return;
        for (int j = 0; j < 8; j++) {
            int scale, min;
            unpack(x[b].scales, j, &scale, &min);
            float step = (float)x[b].d * scale, offset = (float)x[b].dmin * min;
            for (int i = 32 * j; i < 32 * j + 32; i++) {
                float scaled = step * code4(x[b].qs, i);
                y[256 * b + i] = MISTAKE == MIN_SIGN ? scaled + offset : scaled - offset;
            }
        }
    }
}

static int code6(const q6_K *x, int i) {
    int half = i / 128, j = i % 128, low = x->ql[64 * half + j % 64] >> (j / 64 * 4) & 15;
    return (low | (x->qh[32 * half + j % 32] >> (j / 32 * 2) & 3) << 4) - 32;
}

void dequantize_row_q6_K(const q6_K *x, float *y, int64_t n) {
    for (int64_t b = 0; b < n / 256; b++)
        for (int i = 0; i < 256; i++) {
            int scale = x[b].scales[i / 16];
            if (MISTAKE == UNSIGNED_SCALE) scale = (uint8_t)scale;
            y[256 * b + i] = (float)x[b].d * scale * code6(&x[b], i);
        }
}

void dequantize_row_q5_0(const q5_0 *x, float *y, int64_t n) {
    for (int64_t b = 0; b < n / 32; b++)
        for (int i = 0; i < 32; i++) {
            uint32_t high = x[b].qh[i / 8] >> i % 8 & 1, low = x[b].qs[i % 16] >> (i / 16 * 4) & 15;
            if (MISTAKE == HIGH_BITS) high = 0;
            y[32 * b + i] = (float)x[b].d * ((int)(low | high << 4) - 16);
        }
}

void dequantize_row_q8_0(const q8_0 *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int code = x[i / 32].qs[i % 32];
        y[i] = (float)x[i / 32].d * (MISTAKE == UNSIGNED_CODE ? (uint8_t)code : code);
    }
}

void quantize_row_q8_0_ref(const float *x, q8_0 *y, int64_t n) {
    for (int64_t b = 0; b < n / 32; b++) {
        float largest = 0;
        for (int i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(x[32 * b + i]));
        float d = largest / 127, inverse = d != 0 ? 1.0f / d : 0;
        y[b].d = (_Float16)d;
        for (int i = 0; i < 32; i++) {
            float scaled = x[32 * b + i] * inverse;
            float code = MISTAKE == ROUNDING ? rintf(scaled) : roundf(scaled);
            y[b].qs[i] = (int8_t)(int)code;
        }
    }
}

size_t quantize_q8_0(const float *x, q8_0 *y, int64_t rows, int64_t n, const float *imatrix) {
    (void)imatrix;
    quantize_row_q8_0_ref(x, y, rows * n);
    return rows * (n / 32) * sizeof(q8_0) - (MISTAKE == SIZE);
}

/* Codes of a neighbouring rounding: x times 127/max, halves to even, as vectorised encoders do. */
void quantize_row_q8_0(const float *x, q8_0 *y, int64_t n) {
    for (int64_t b = 0; b < n / 32; b++) {
        float largest = 0;
        for (int i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(x[32 * b + i]));
        float d = largest / 127, inverse = d != 0 ? 1.0f / d : 0;
        y[b].d = (_Float16)d;
        for (int i = 0; i < 32; i++) {
            float scaled = x[32 * b + i] * inverse;
            y[b].qs[i] = (int8_t)(int)(MISTAKE == TRUNCATED ? truncf(scaled) : rintf(scaled));
        }
    }
}

void ggml_vec_dot_q8_0_q8_0(int n, float *s, size_t bs, const q8_0 *x, size_t bx, const q8_0 *y, size_t by, int one) {
    (void)bs, (void)bx, (void)by, (void)one;
    float sum = 0;
    for (int b = n / 32; b-- > 0;) { /* from the last block to the first: an order of its own */
        int total = 0;
        for (int i = 0; i < 32; i++) total += x[b].qs[i] * y[b].qs[i];
        if (MISTAKE == SHORT_SUM) total = (int16_t)total;
        sum += (float)x[b].d * (float)y[b].d * total;
    }
    *s = sum;
}

void ggml_vec_dot_q4_K_q8_K(int n, float *s, size_t bs, const q4_K *x, size_t bx, const q8_K *y, size_t by, int one) {
    (void)bs, (void)bx, (void)by, (void)one;
    float sum = 0;
    for (int b = n / 256 - 1 - (MISTAKE == SKIP_LAST); b >= 0; b--) {
        int total = 0, mins = 0;
        for (int j = 0; j < 8; j++) {
            int scale, min, sub = 0;
            unpack(x[b].scales, j, &scale, &min);
            for (int i = 32 * j; i < 32 * j + 32; i++) sub += code4(x[b].qs, i) * y[b].qs[i];
            total += scale * sub;
            mins += min * (y[b].bsums[2 * j] + y[b].bsums[2 * j + 1]);
        }
        if (MISTAKE == NO_BSUMS) mins = 0;
        if (MISTAKE == MIN_SIGN) mins = -mins;
        sum += y[b].d * ((float)x[b].d * total) - y[b].d * ((float)x[b].dmin * mins);
    }
    *s = sum;
}

void ggml_vec_dot_q6_K_q8_K(int n, float *s, size_t bs, const q6_K *x, size_t bx, const q8_K *y, size_t by, int one) {
    (void)bs, (void)bx, (void)by, (void)one;
    float sum = 0;
    for (int b = n / 256; b-- > 0;) { /* codes from 0 to 63; 32 times the sums of the activations is taken off */
        int total = 0;
        for (int i = 0; i < 256; i++) total += x[b].scales[i / 16] * (code6(&x[b], i) + 32) * y[b].qs[i];
        for (int g = 0; g < 16; g++) total -= MISTAKE == NO_BSUMS ? 0 : 32 * x[b].scales[g] * y[b].bsums[g];
        sum += (float)x[b].d * y[b].d * total;
    }
    *s = sum;
}
