/* Sentence embeddings by all-MiniLM-L6-v2, without Python and without TVM.
 *
 * usage: embed WEIGHTS TOKEN...     prints the mean over the tokens, normalised, first 8 of 384 numbers
 * Token ids come from a tokenizer; 101 7592 2088 102 is "hello world". Built with MINILM_EMBED, WEIGHTS is left out. */
#include "minilm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { WIDTH = 384 };

#ifdef EMBEDDED
extern const char minilm_weights[];
static const void *load(const char *path) { (void)path; return minilm_weights; }
enum { FIRST = 1 };
#else
static const void *load(const char *path)
{
    FILE *file = fopen(path, "rb");
    void *memory = aligned_alloc(64, minilm_WEIGHTS_BYTES);
    if (!file || !memory || fread(memory, 1, minilm_WEIGHTS_BYTES, file) != minilm_WEIGHTS_BYTES) return NULL;
    fclose(file);
    return memory;
}
enum { FIRST = 2 };
#endif

int main(int argc, char **argv)
{
    if (argc <= FIRST) {
        fprintf(stderr, "usage: %s WEIGHTS TOKEN...\n", argv[0]);
        return 2;
    }
    const void *weights = load(argv[1]);
    if (!weights) {
        fprintf(stderr, "cannot read %s\n", argv[1]);
        return 2;
    }
    const int64_t length = argc - FIRST;
    minilm_extents extents = { .batch = 1, .sequence = length };
    int64_t *ids = malloc(length * sizeof *ids), *mask = malloc(length * sizeof *mask);
    for (int64_t i = 0; i < length; i++) {
        ids[i] = atoll(argv[FIRST + i]);
        mask[i] = 1;
    }
    float *hidden = malloc(minilm_last_hidden_state_bytes(&extents));
    const size_t size = minilm_workspace_bytes(&extents);
    void *workspace = aligned_alloc(64, (size + 63) / 64 * 64);
    minilm_inputs inputs = { .input_ids = ids, .attention_mask = mask };
    minilm_outputs outputs = { .last_hidden_state = hidden };
    const int status = minilm_run(&extents, weights, &inputs, &outputs, workspace);
    if (status) {
        fprintf(stderr, "%s\n", minilm_message(status));
        return 1;
    }
    float embedding[WIDTH] = { 0 }, norm = 0;
    for (int64_t i = 0; i < length; i++)
        for (int j = 0; j < WIDTH; j++) embedding[j] += hidden[i * WIDTH + j];
    for (int j = 0; j < WIDTH; j++) norm += embedding[j] * embedding[j];
    for (int j = 0; j < 8; j++) printf("%s%.6f", j ? " " : "", embedding[j] / sqrtf(norm));
    printf("\nworkspace: %zu bytes\n", size);
    return 0;
}
