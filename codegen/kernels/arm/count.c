/* A plugin of qemu-user that counts executed instructions by the symbol they belong to.
 *
 * Build: cc -O2 -shared -fPIC -o count.so count.c      Use: qemu-aarch64 -plugin ./count.so -d plugin PROGRAM
 * At exit it prints one line "count SYMBOL INSTRUCTIONS" per symbol. The few functions of the plugin interface that it
 * needs are declared here (QEMU, docs/devel/tcg-plugins), so that no headers of QEMU have to be installed. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum plugin_op { ADD_U64 };
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *, enum plugin_op, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const char *qemu_plugin_insn_symbol(const struct qemu_plugin_insn *);
extern void qemu_plugin_outs(const char *);

int qemu_plugin_version = 1;

enum { SYMBOLS = 4096 };
static struct { const char *name; uint64_t count; } table[SYMBOLS];
static int used;

static uint64_t *counter(const char *name) {
    for (int i = 0; i < used; i++)
        if (!strcmp(table[i].name, name)) return &table[i].count;
    if (used == SYMBOLS) return &table[SYMBOLS - 1].count;
    table[used].name = strdup(name);
    return &table[used++].count;
}

static void translated(plugin_id id, struct qemu_plugin_tb *block) {
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(block, i);
        const char *name = qemu_plugin_insn_symbol(insn);
        if (name) qemu_plugin_register_vcpu_insn_exec_inline(insn, ADD_U64, counter(name), 1);
    }
}

static void finished(plugin_id id, void *unused) {
    char line[256];
    for (int i = 0; i < used; i++) {
        snprintf(line, sizeof line, "count %.200s %llu\n", table[i].name, (unsigned long long)table[i].count);
        qemu_plugin_outs(line);
    }
}

int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
