/* SPDX-License-Identifier: MIT */
/* The program flashkda: finds the subcommand and hands over. */
#include "command.h"
#include "file.h"
#include "progress.h"

#include <errno.h>
#include <flash_kda.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct command {
    const char *name;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"run", command_run},
    {"gen", command_gen},
    {"bench", command_bench},
    {"info", command_info},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static char program[] = "flashkda";

static const char documentation[] =
    "Runs, checks and times Kimi Delta Attention (KDA).\n\n"
    "  run    run prefill on a file, time it, check it against the exact answer\n"
    "  gen    make a file of random inputs\n"
    "  bench  time a table of cases\n"
    "  info   say what this machine and this build can do\n"
    "  help   print this, or with the name of a subcommand its help\v"
    "To begin with:\n"
    "  flashkda run data/small_softplus.safetensors --check\n"
    "  flashkda gen case.safetensors --tokens 4096 --heads 8 --gate softplus\n"
    "  flashkda run case.safetensors --check -o result.safetensors\n"
    "  flashkda help run\n\n"
    "Exit status: 0 all is well, 1 a result outside its tolerance, 2 a bad file or argument.\n"
    "The environment variable FLASH_KDA_CPU forces a level of the CPU backend, FLASH_KDA_CUDA one of the CUDA "
    "backend.";

struct invocation {
    const struct command *command;
    int argc;
    char **argv;
};

static const struct command *find_command(const char *name) {
    for (int i = 0; i < COMMANDS; i++)
        if (strcmp(name, commands[i].name) == 0)
            return &commands[i];
    return NULL;
}

/* help [COMMAND]: what --help would print. */
static error_t print_help(struct argp_state *state) {
    static char option[] = "--help";
    const char *name = state->next < state->argc ? state->argv[state->next] : NULL;
    if (!name) {
        argp_state_help(state, stdout, ARGP_HELP_STD_HELP);
        return 0;
    }
    struct invocation *invocation = state->input;
    invocation->command = find_command(name);
    if (!invocation->command)
        return argument_error(state, "'%s' is no subcommand: expected run, gen, bench or info", name);
    invocation->argv = state->argv + state->next - 1;
    invocation->argv[1] = option;
    invocation->argc = 2;
    state->next = state->argc;
    return 0;
}

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    struct invocation *invocation = state->input;
    switch (key) {
    case ARGP_KEY_ARG:
        if (strcmp(argument, "help") == 0)
            return print_help(state);
        invocation->command = find_command(argument);
        if (!invocation->command)
            return argument_error(state, "'%s' is no subcommand: expected run, gen, bench, info or help",
                                  argument);
        invocation->argv = state->argv + state->next - 1;
        invocation->argc = state->argc - state->next + 1;
        state->next = state->argc; /* the rest is the subcommand's */
        return 0;
    case ARGP_KEY_NO_ARGS:
        return argument_error(state, "no subcommand: expected run, gen, bench, info or help");
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void print_version(FILE *stream, struct argp_state *state) {
    (void)state;
    fprintf(stream, "flashkda %s\n", flash_kda_version());
}

/* At exit, of --help too: what could not be written is an error. */
static void close_output(void) {
    bool wrong = ferror(stdout);
    if (fclose(stdout) == 0 && !wrong)
        return;
    report_error(program, "cannot write to standard output: %s", strerror(errno));
    _exit(STATUS_ERROR);
}

/* Ctrl-C, a closed pipe and their like end the program as they end any other, but nothing half done stays behind. */
static void end_quietly(int signal_number) {
    progress_abandon(); /* NOLINT(bugprone-signal-handler,cert-sig30-c): write() alone */
    new_file_abandon(); /* NOLINT(bugprone-signal-handler,cert-sig30-c): unlink() alone */
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static void handle_signals(void) {
    static const int ends[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (signal(ends[i], end_quietly) == SIG_IGN)
            signal(ends[i], SIG_IGN); /* as nohup wants it */
    signal(SIGXFSZ, SIG_IGN);         /* a write that cannot be is an error like any other */
}

int main(int argc, char **argv) {
    static const struct argp argp = {
        .parser = parse_option, .args_doc = "run|gen|bench|info|help [ARGUMENT...]", .doc = documentation};
    struct invocation invocation = {0};
    handle_signals();
    atexit(close_output);
    argp_program_version_hook = print_version;
    if (argc > 0)
        argv[0] = program;
    if (!parse_arguments(&argp, argc, argv, ARGP_IN_ORDER, &invocation))
        return STATUS_ERROR;
    char name[32];
    snprintf(name, sizeof name, "%s %s", program, invocation.command->name);
    invocation.argv[0] = name;
    return invocation.command->run(invocation.argc, invocation.argv);
}
