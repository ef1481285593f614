/* A qemu plugin that counts the guest's instructions up to each mark.
 *
 * A guest sets mark number k by calling getpgid(-7000000 - k). No such process group can exist, so
 * without the plugin the call returns ESRCH and has no effect. Each mark writes a line to the file
 * of the argument out=: its number, the instructions so far, and the dot products among them (SDOT,
 * UDOT, and the matrix products of i8mm). The guest must have one thread; several threads would
 * race for the counters.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "qemu-plugin.h"

enum { GETPGID = 155, FIRST_MARK = -7000000 };

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

static uint64_t instructions, dot_products;
static FILE *out;

/* Vector and by-element forms of S/UDOT; SMMLA, UMMLA and USMMLA. */
static int is_dot_product(uint32_t word)
{
    return (word & 0x9f20fc00) == 0x0e009400 || (word & 0x9f00f400) == 0x0f00e000 ||
           (word & 0xdf20f400) == 0x4e00a400;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    size_t count = qemu_plugin_tb_n_insns(block), dots = 0;

    for (size_t i = 0; i < count; i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
        dots += is_dot_product(word);
    }
    qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &instructions,
                                             count);
    if (dots)
        qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &dot_products,
                                                 dots);
}

static void system_call(qemu_plugin_id_t id, unsigned int cpu, int64_t number, uint64_t first,
                        uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6,
                        uint64_t a7, uint64_t a8)
{
    int32_t group = (int32_t)first;

    if (number == GETPGID && group <= FIRST_MARK) {
        fprintf(out, "%" PRId32 " %" PRIu64 " %" PRIu64 "\n", FIRST_MARK - group, instructions,
                dot_products);
        fflush(out);
    }
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                                           char **argv)
{
    for (int i = 0; i < argc; i++)
        if (!strncmp(argv[i], "out=", 4))
            out = fopen(argv[i] + 4, "w");
    if (!out) {
        fputs("count: name a file that can be written with out=FILE\n", stderr);
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, system_call);
    return 0;
}
