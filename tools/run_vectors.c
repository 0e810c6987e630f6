/* Runs the vectors of `refimpl vectors` against a ggml shared library, by the names in index.tsv.

       cc -O1 -o run_vectors tools/run_vectors.c -ldl
       ./run_vectors LIBRARY DIR [TEXT ...]       by default: strict reference generic-fma avx2

   Prints every case that differs; ends with 1 if one does, and with 2 if none could be run. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*convert)(const void *, void *, int64_t);
typedef size_t (*encode)(const void *, void *, int64_t, int64_t, const void *);
typedef void (*dot)(int, float *, size_t, const void *, size_t, const void *, size_t, int);

static void *load(const char *dir, const char *name, long offset, size_t size) {
    char path[4096];
    if (!strcmp(name, "-")) return NULL;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "rb");
    void *data = malloc(size + 1);
    if (!file || fseek(file, offset, SEEK_SET) || fread(data, 1, size, file) != size) perror(path), exit(3);
    fclose(file);
    return data;
}

static int same(const void *got, const void *want, size_t size, int bits) {
    if (!bits) return !memcmp(got, want, size);
    for (size_t i = 0; i < size / 4; i++) {
        float a, b;
        memcpy(&a, (char *)got + 4 * i, 4), memcpy(&b, (char *)want + 4 * i, 4);
        if (memcmp(&a, &b, 4) && !(a != a && b != b)) return 0;
    }
    return 1;
}

int main(int count, char **args) {
    char line[4096], id[256], op[32], format[32], text[32], function[128], equality[16], file[3][256], path[4096];
    char *defaults[] = {"strict", "reference", "generic-fma", "avx2"}, **texts = count > 3 ? args + 3 : defaults;
    int passed = 0, failed = 0, skipped = 0, type, texts_count = count > 3 ? count - 3 : 4;
    long long rows, n, offset[3], size[3];
    void *library = count > 2 ? dlopen(args[1], RTLD_LAZY) : NULL, (*init)(void), (*grids)(int);
    if (!library) return fprintf(stderr, "%s\n", count > 2 ? dlerror() : "run_vectors LIBRARY DIR [TEXT ...]"), 3;
    *(void **)&init = dlsym(library, "ggml_cpu_init"), *(void **)&grids = dlsym(library, "ggml_quantize_init");
    if (init) init();
    snprintf(path, sizeof path, "%s/index.tsv", args[2]);
    FILE *index = fopen(path, "r");
    if (!index) return perror(path), 3;
    while (fgets(line, sizeof line, index)) {
        if (line[0] == '#') continue;
        if (sscanf(line, "%255s %31s %31s %d %31s %127s %15s %lld %lld %255s %lld %lld %255s %lld %lld %255s %lld %lld", id, op,
                   format, &type, text, function, equality, &rows, &n, file[0], &offset[0], &size[0], file[1], &offset[1],
                   &size[1], file[2], &offset[2], &size[2]) != 18) return fprintf(stderr, "bad line: %s", line), 3;
        int wanted = !strcmp(text, "any");
        for (int i = 0; i < texts_count; i++) wanted |= !strcmp(text, texts[i]);
        void *call = wanted ? dlsym(library, function) : NULL;
        if (!call) { skipped++; continue; }
        char *x = load(args[2], file[0], offset[0], size[0]), *y = load(args[2], file[1], offset[1], size[1]);
        char *want = load(args[2], file[2], offset[2], size[2]), *got = malloc(size[2]);
        memset(got, 0xAA, size[2]);
        if (grids && !strcmp(op, "encode")) grids(type); /* what the encoders of codebook types look up */
        if (!strcmp(op, "encode") && !strncmp(function, "quantize_", 9)) ((encode)call)(x, got, rows, n, y);
        else if (strcmp(op, "dot")) ((convert)call)(x, got, rows * n);
        else for (long long r = 0; r < rows; r++)
            ((dot)call)(n, (float *)got + r, 0, x + r * (size[0] / rows), 0, y, 0, 1);
        if (same(got, want, size[2], !strcmp(equality, "bits"))) passed++;
        else failed++, printf("differs: %s\n", id);
        free(x), free(y), free(want), free(got);
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed ? 1 : passed ? 0 : 2;
}
