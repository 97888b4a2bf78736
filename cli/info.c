/* SPDX-License-Identifier: MIT */
/* flashkda info: what this machine and this build can do. */
#include "command.h"
#include "machine.h"

#include <flash_kda.h>
#include <jansson.h>
#include <stdio.h>

static const char documentation[] = "Prints the version, the CPU and the levels that the CPU backend can run "
                                    "on it, the backends, the devices and the threads.\v"
                                    "The environment variable FLASH_KDA_CPU forces a level:\n"
                                    "  FLASH_KDA_CPU=generic flashkda info";

static const flash_kda_backend backends[] = {FLASH_KDA_BACKEND_REFERENCE, FLASH_KDA_BACKEND_CPU,
                                             FLASH_KDA_BACKEND_CUDA};
enum { BACKENDS = sizeof backends / sizeof backends[0] };

static const struct argp_option argp_options[] = {{"json", 'j', NULL, 0, "Print one JSON object", 0}, {0}};

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    bool *json = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->err_stream = NULL; /* getopt's own line is enough */
        return 0;
    case 'j':
        *json = true;
        return 0;
    case ARGP_KEY_ARG:
        return argument_error(state, "unexpected argument '%s'", argument);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void print_text(const struct machine *machine, const char *level) {
    printf("version    %s\n", flash_kda_version());
    printf("cpu        %s, %s, %d processors\n", machine->cpu, machine->architecture, machine->processors);
    printf("features   %s\n", machine->features);
    printf("levels    ");
    for (const char *const *name = flash_kda_cpu_levels(); *name; name++) {
        printf(" %s", *name);
    }
    printf("; chosen: %s\n", level);
    printf("threads    %d\n", machine->threads);
    printf("backends  ");
    for (int i = 0; i < BACKENDS; i++) {
        printf("%s %s%s", i ? "," : "", flash_kda_backend_name(backends[i]),
               flash_kda_backend_available(backends[i]) ? "" : " (not available)");
    }
    printf("\ndevices    cpu\n");
}

static bool print_json(const struct machine *machine, const char *level) {
    json_t *levels = json_array(), *available = json_object();
    for (const char *const *name = flash_kda_cpu_levels(); *name; name++) {
        json_array_append_new(levels, json_string(*name));
    }
    for (int i = 0; i < BACKENDS; i++) {
        json_object_set_new(available, flash_kda_backend_name(backends[i]),
                            json_boolean(flash_kda_backend_available(backends[i])));
    }
    json_t *root =
        json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:o, s:s, s:o, s:[s]}", "version", flash_kda_version(), "cpu",
                  machine->cpu, "architecture", machine->architecture, "features", machine->features,
                  "processors", machine->processors, "threads", machine->threads, "levels", levels, "level",
                  level, "backends", available, "devices", "cpu");
    if (!root) {
        return false;
    }
    json_dumpf(root, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(root);
    return true;
}

int command_info(int argc, char **argv) {
    static const struct argp argp = {.options = argp_options, .parser = parse_option, .doc = documentation};
    bool json = false;
    if (!parse_arguments(&argp, argc, argv, 0, &json)) {
        return STATUS_ERROR;
    }
    const char *level = flash_kda_cpu_level();
    if (!level) {
        return report_error(argv[0], "%s", flash_kda_last_error());
    }
    struct machine machine;
    machine_describe(&machine);
    if (!json) {
        print_text(&machine, level);
    } else if (!print_json(&machine, level)) {
        return report_error(argv[0], "out of memory");
    }
    return STATUS_OK;
}
