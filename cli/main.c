/* SPDX-License-Identifier: MIT */
/* The program flashkda: finds the subcommand and hands over. */
#include "command.h"

#include <errno.h>
#include <flash_kda.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct command {
    const char *name;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"run", command_run},
    {"gen", command_gen},
    {"bench", command_bench},
    {"info", command_info},
};

static const char documentation[] =
    "Runs, checks and times Kimi Delta Attention (KDA).\n\n"
    "  run    run prefill on a file, time it, check it against the exact answer\n"
    "  gen    make a file of random inputs\n"
    "  bench  time a table of cases\n"
    "  info   say what this machine and this build can do\v"
    "To begin with:\n"
    "  flashkda run data/small_softplus.safetensors --check\n"
    "  flashkda gen case.safetensors --tokens 4096 --heads 8 --gate softplus\n"
    "  flashkda run case.safetensors --check -o result.safetensors\n"
    "  flashkda run --help\n\n"
    "Exit status: 0 all is well, 1 a result outside its tolerance, 2 a bad file or argument.\n"
    "The environment variable FLASH_KDA_CPU forces a level of the CPU backend, FLASH_KDA_CUDA one of the CUDA "
    "backend.";

struct invocation {
    const struct command *command;
    int argc;
    char **argv;
};

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    struct invocation *invocation = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->err_stream = NULL; /* getopt's own line is enough */
        return 0;
    case ARGP_KEY_ARG:
        for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++)
            if (strcmp(argument, commands[i].name) == 0)
                invocation->command = &commands[i];
        if (!invocation->command)
            return argument_error(state, "'%s' is no subcommand: expected run, gen, bench or info", argument);
        invocation->argv = state->argv + state->next - 1;
        invocation->argc = state->argc - state->next + 1;
        state->next = state->argc; /* the rest is the subcommand's */
        return 0;
    case ARGP_KEY_NO_ARGS:
        return argument_error(state, "no subcommand: expected run, gen, bench or info, or --help");
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void print_version(FILE *stream, struct argp_state *state) {
    (void)state;
    fprintf(stream, "flashkda %s\n", flash_kda_version());
}

int main(int argc, char **argv) {
    static char program[] = "flashkda";
    static const struct argp argp = {
        .parser = parse_option, .args_doc = "run|gen|bench|info [ARGUMENT...]", .doc = documentation};
    struct invocation invocation = {0};
    signal(SIGPIPE, SIG_IGN); /* a write that cannot be is an error like any other */
    signal(SIGXFSZ, SIG_IGN);
    argp_program_version_hook = print_version;
    if (argc > 0)
        argv[0] = program;
    if (!parse_arguments(&argp, argc, argv, ARGP_IN_ORDER, &invocation))
        return STATUS_ERROR;
    char name[32];
    snprintf(name, sizeof name, "%s %s", program, invocation.command->name);
    invocation.argv[0] = name;
    int status = invocation.command->run(invocation.argc, invocation.argv);
    if (fflush(stdout) != 0 || ferror(stdout))
        return report_error(program, "cannot write to standard output: %s", strerror(errno));
    return status;
}
