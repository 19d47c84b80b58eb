/* Calls kernels on the arrays of a file and writes them back: how ARM kernels run on another machine, under qemu.
 *
 * usage: driver CASES RESULTS. The generated file around it defines
 *     static const kernel kernels[]     the functions, see codegen/cexport/kernels.py for their signature
 * CASES is a sequence of calls: kernel, repetitions, number of arguments (uint64 each), then per argument its size in bytes
 * (or ~0 for an integer), the distance of its address from a multiple of 64 (or the integer), and its bytes. RESULTS
 * receives the bytes of all buffers in order. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { ARGUMENTS = 32 };

static uint64_t word(FILE *in) {
    uint64_t value;
    if (fread(&value, sizeof value, 1, in) != 1) exit(3);
    return value;
}

int main(int argc, char **argv) {
    FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
    if (!in || !out) return 2;
    for (uint64_t calls = word(in); calls; calls--) {
        uint64_t index = word(in), repeat = word(in), count = word(in);
        uint64_t a[ARGUMENTS] = {0}, size[ARGUMENTS] = {0};
        void *memory[ARGUMENTS] = {0};
        if (count > ARGUMENTS) return 4;
        for (uint64_t i = 0; i < count; i++) {
            uint64_t bytes = word(in), offset = word(in);
            a[i] = offset;
            if (bytes == ~(uint64_t)0) continue;
            size[i] = bytes;
            memory[i] = aligned_alloc(64, (bytes + offset + 127) / 64 * 64);
            a[i] = (uint64_t)(uintptr_t)memory[i] + offset;
            if (fread((void *)(uintptr_t)a[i], 1, bytes, in) != bytes) return 5;
        }
        for (; repeat; repeat--)
            /* Arguments beyond those a kernel takes are left unread. */
            kernels[index](a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14],
                           a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27],
                           a[28], a[29], a[30], a[31]);
        for (uint64_t i = 0; i < count; i++)
            if (memory[i]) {
                fwrite((void *)(uintptr_t)a[i], 1, size[i], out);
                free(memory[i]);
            }
    }
    return fclose(out) != 0;
}
