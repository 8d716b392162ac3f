"""What a task may name: the set-up types, getters and metrics there are, and what each of them needs.

Getters and metrics are those of desktop-env 1.0.2 (`desktop_env/evaluators`), as its two packages export them, and the
few that our grader adds. Getter configurations may hold other keys, which getters do not look at; a set-up step may
not, since upstream hands its parameters over as keyword arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .shapes import (
    ANYTHING,
    COMMAND,
    FILE_NAME,
    FILE_NAME_OR_NOTHING,
    FLAG,
    INDEX,
    INTEGER,
    OBJECT,
    PATH,
    STRING,
    TEXT,
    TEXTS,
    WEB,
    Shape,
    between,
    choice,
    each,
    fields,
    is_true,
    one,
)

CDP, TREE, INTERNET, PROXY = "cdp", "accessibility_tree", "internet", "proxy"
DRIVE, LOGIN, VLC, OCR = "google_drive", "google_login", "vlc_http", "ocr"
NEEDS = (CDP, TREE, INTERNET, PROXY, DRIVE, LOGIN, VLC, OCR)
"""The words for what a task needs, in the order in which they are told. Behind them come its files, `asset:<url>`."""

LONGEST_SLEEP = 600
LONGEST_WAIT = 600


@dataclass(frozen=True)
class StepType:
    """A set-up type. `pages`: the parameter that lists pages to be opened."""

    parameters: Shape
    needs: tuple[str, ...] = ()
    pages: str | None = None


@dataclass(frozen=True)
class Getter:
    """`config` is the shape of its configuration, `page` the key of a page that it opens, `broken` why it cannot
    work in any task."""

    config: Shape = OBJECT
    needs: tuple[str, ...] = ()
    page: str | None = None
    broken: str = ""


@dataclass(frozen=True)
class MetricType:
    """A metric is called with the result, with the expected value if `compares`, and with options.

    compares          None when it may be called either way
    options           names that it takes beside those required; None when it takes any
    required_options  what it cannot do without
    """

    compares: bool | None
    options: frozenset[str] | None = frozenset()
    required_options: Mapping[str, Shape] = field(default_factory=lambda: MappingProxyType({}))
    needs: tuple[str, ...] = ()


def _drive_operations(value: object) -> Iterator[tuple[str, str]]:
    yield from _DRIVE(value)
    operations, arguments = (value.get("operation"), value.get("args")) if isinstance(value, dict) else (None, None)
    if not isinstance(operations, list) or not isinstance(arguments, list):
        return
    if len(arguments) != len(operations):
        yield ".args", f"must have one entry for each operation, which are {len(operations)}"
    for index, (operation, argument) in enumerate(zip(operations, arguments, strict=False)):
        if isinstance(operation, str) and operation in _DRIVE_ARGUMENTS:
            for place, message in _DRIVE_ARGUMENTS[operation](argument):
                yield f".args[{index}]{place}", message


_FOLDERS = one("a name or a list of names", lambda value: not [*(TEXT if isinstance(value, str) else TEXTS)(value)])
_DRIVE_ARGUMENTS: Mapping[str, Shape] = {
    "delete": fields(optional={"query": STRING, "trash": FLAG}),
    "mkdirs": fields({"path": _FOLDERS}),
    "upload": fields({"url": WEB, "path": _FOLDERS}),
}
_DRIVE = fields(
    {"operation": each(choice(*_DRIVE_ARGUMENTS), "a list of operations"), "args": each(ANYTHING)},
    {"settings_file": STRING},
)


def _step(
    required: Mapping[str, Shape] | None = None,
    optional: Mapping[str, Shape] | None = None,
    *needs: str,
    pages: str | None = None,
    closed: bool = True,
) -> StepType:
    return StepType(fields(required, optional, closed=closed), needs, pages)


_UNTIL = fields(optional={"returncode": INTEGER, "stdout": STRING, "stderr": STRING}, closed=True)
_VERIFICATION = fields(optional={"window_exists": TEXT, "command_success": TEXT}, closed=True)
_EXECUTE = _step(
    {"command": COMMAND},
    {"stdout": FILE_NAME_OR_NOTHING, "stderr": FILE_NAME_OR_NOTHING, "shell": FLAG, "until": _UNTIL},
)
_WINDOW = _step({"window_name": TEXT}, {"strict": FLAG, "by_class": FLAG})
_VISIT = fields({"url": TEXT, "title": STRING, "visit_time_from_now_in_seconds": between(-1e10, 1e10, "seconds")})

STEPS: Mapping[str, StepType] = {
    "download": _step({"files": each(fields({"url": WEB, "path": PATH}), "a list of files")}),
    "upload_file": _step({"files": each(fields({"local_path": PATH, "path": PATH}), "a list of files")}),
    "change_wallpaper": _step({"path": PATH}),
    "open": _step({"path": PATH}),
    "launch": _step({"command": COMMAND}, {"shell": FLAG}),
    "execute": _EXECUTE,
    "command": _EXECUTE,
    "execute_with_verification": _step(
        {"command": COMMAND},
        {
            "verification": _VERIFICATION,
            "max_wait_time": between(0, LONGEST_WAIT, f"seconds, from 0 to {LONGEST_WAIT}"),
            "check_interval": between(0.01, LONGEST_WAIT, f"seconds, from 0.01 to {LONGEST_WAIT}"),
            "shell": FLAG,
        },
    ),
    "sleep": _step({"seconds": between(0, LONGEST_SLEEP, f"a number from 0 to {LONGEST_SLEEP}")}),
    "activate_window": _WINDOW,
    "close_window": _WINDOW,
    "proxy": _step({}, {"client_password": STRING}, INTERNET, PROXY),
    "chrome_open_tabs": _step({"urls_to_open": TEXTS}, {}, CDP, pages="urls_to_open"),
    "chrome_close_tabs": _step({"urls_to_close": TEXTS}, {}, CDP),
    # Upstream takes any parameter in these three.
    "login": _step(
        {}, {"settings_file": STRING, "platform": choice("googledrive")}, CDP, INTERNET, LOGIN, closed=False
    ),
    "googledrive": StepType(_drive_operations, (INTERNET, DRIVE)),
    "update_browse_history": _step({"history": each(_VISIT, "a list of visits")}, closed=False),
}


def _files(path: Shape, **optional: Shape) -> Shape:
    """The configuration of `cloud_file` and `vm_file`: one file, or lists with `multi`."""
    more = {"multi": FLAG, "gives": each(INTEGER, "a list of indices"), **optional}
    single = fields({"path": path, "dest": FILE_NAME}, more)
    several = fields({"path": each(path, "a list, as multi is set", 1), "dest": each(FILE_NAME, least=1)}, more)

    def check(value: object) -> Iterator[tuple[str, str]]:
        multi = isinstance(value, dict) and is_true(value.get("multi"))
        wrong = False
        for place, message in (several if multi else single)(value):
            wrong = True
            yield place, message
        if wrong or not isinstance(value, dict):
            return
        count = len(value["path"]) if multi else 1
        if multi and len(value["dest"]) != count:
            yield ".dest", f"must have one name for each path, which are {count}"
        for position, index in enumerate(value.get("gives") or []):
            if not 0 <= index < count:
                yield f".gives[{position}]", f"must be the index of a path, of which there are {count}"

    return check


def _drive_file(value: object) -> Iterator[tuple[str, str]]:
    names = {"query": TEXTS, "path": TEXTS, "query_list": each(TEXTS), "path_list": each(TEXTS)}
    # Upstream looks at the first of these that is there.
    name = next((name for name in names if isinstance(value, dict) and name in value), "query")
    several = name.endswith("_list")
    dest = each(FILE_NAME, least=1) if several else FILE_NAME
    wrong = [*fields({name: names[name], "dest": dest}, {"settings_file": STRING})(value)]
    yield from wrong
    if several and not wrong and isinstance(value, dict) and len(value["dest"]) != len(value[name]):
        yield ".dest", f"must have one name for each entry of {name}, which are {len(value[name])}"


def _dash_part(value: object) -> Iterator[tuple[str, str]]:
    keyed = isinstance(value, dict) and value.get("returnType") == "json"
    required = {"partIndex": INDEX, "returnType": choice("string", "json"), **({"key": STRING} if keyed else {})}
    yield from fields(required, {"needDeleteId": FLAG, "goto_prefix": STRING})(value)


_DAYS = frozenset(
    {"tomorrow", "5th next month", "10th next month", "11th next month", "this month", "this Saturday", "this Sunday"}
    | {f"next {day}" for day in ("Monday", "Friday", "Saturday", "Sunday", "Monday split", "Friday split")}
    | {f"next week {day}" for day in ("Friday", "Saturday", "Sunday")}
    | {"first monday four months later", "first monday eight months later"}
)
_DAY = one(
    "a day that rule_relativeTime knows, such as tomorrow or next Monday",
    lambda value: isinstance(value, str) and value in _DAYS,
)
_RELATIVE = fields({"relativeTime": fields({"from": _DAY}, {"to": _DAY}), "expected": OBJECT}, {"timezone": STRING})
_INFO = fields(
    {"selector": ANYTHING},
    {"action": choice("inner_text", "attribute", "click_and_inner_text", "click_and_attribute"), "attribute": TEXT},
)
_PREFIX = {"goto_prefix": STRING}
_OBJECTS = ("label", "class_single", "class_multi", "xpath", "input")
_HTML = fields(
    {"category": choice("class", "label", "xpath", "input", "class&url")},
    {f"{name}Object": OBJECT for name in _OBJECTS} | _PREFIX,
)
_DEST = Getter(fields({"dest": FILE_NAME}))
_COMMAND = Getter(fields({"command": COMMAND}, {"shell": FLAG}))
_SLIDE = Getter(fields({"ppt_file_path": PATH, "slide_index": INDEX, "dest": FILE_NAME}))
_PARSE_PATH = Getter(fields({"parse_keys": TEXTS}, _PREFIX), (TREE,))
_PROFILE = Getter()
"""Reads a file of the guest that it knows."""

GETTERS: Mapping[str, Getter] = {
    "info_from_website": Getter(
        fields({"url": TEXT}, {"infos": each(_INFO, "a list of what to read")}), (CDP,), page="url"
    ),
    "page_info": Getter(fields({"url": TEXT}), (CDP,), page="url"),
    "pdf_from_url": Getter(fields({"path": TEXT, "dest": FILE_NAME}), (CDP,), page="path"),
    "open_tabs_info": Getter(needs=(CDP,)),
    "active_tab_info": Getter(fields(optional=_PREFIX), (CDP, TREE)),
    "number_of_search_results": Getter(needs=(CDP, INTERNET)),
    "active_tab_html_parse": Getter(_HTML, (CDP, TREE)),
    "gotoRecreationPage_and_get_html_content": Getter(
        fields({"selector": choice("class"), "class": TEXT}, {"order": INDEX}), (CDP, INTERNET)
    ),
    "active_url_from_accessTree": Getter(fields(optional=_PREFIX), (TREE,)),
    "active_tab_url_parse": Getter(
        fields({"parse_keys": TEXTS}, {"replace": OBJECT, "split_list": FLAG, **_PREFIX}), (TREE,)
    ),
    "url_dashPart": Getter(_dash_part, (TREE,)),
    "macys_product_url_parse": _PARSE_PATH,
    "url_path_parse": _PARSE_PATH,
    "accessibility_tree": Getter(needs=(TREE,)),
    **dict.fromkeys(
        (
            *("default_search_engine", "bookmarks", "shortcuts_on_desktop", "enabled_experiments", "chrome_language"),
            *("chrome_font_size", "profile_name", "enable_do_not_track", "enable_enhanced_safety_browsing"),
            *("enable_safe_browsing", "new_startup_page", "find_unpacked_extension_path", "data_delete_automacally"),
            *("find_installed_extension_name", "vm_terminal_output", "vm_screen_size", "default_video_player"),
        ),
        _PROFILE,
    ),
    **dict.fromkeys(("cookie_data", "history", "vm_wallpaper", "vlc_config"), _DEST),
    "googledrive_file": Getter(_drive_file, (INTERNET, DRIVE)),
    "cloud_file": Getter(_files(WEB)),
    "vm_file": Getter(_files(PATH, time_suffix=FLAG, time_format=STRING)),
    "cache_file": Getter(fields({"path": FILE_NAME})),
    "content_from_vm_file": Getter(
        fields({"path": PATH, "file_type": choice("xlsx"), "file_content": choice("last_row")})
    ),
    "vm_command_line": _COMMAND,
    "vm_command_error": _COMMAND,
    "gimp_config_file": Getter(fields({"file_name": FILE_NAME, "dest": FILE_NAME})),
    "audio_in_slide": _SLIDE,
    "background_image_in_slide": _SLIDE,
    "vm_window_size": Getter(fields({"app_class_name": TEXT})),
    "list_directory": Getter(fields({"path": PATH})),
    "rule": Getter(fields({"rules": ANYTHING})),
    "rule_relativeTime": Getter(fields({"rules": _RELATIVE})),
    "time_diff_range": Getter(fields({"diff_range_in_minutes": ANYTHING})),
    "vlc_playing_info": Getter(fields({"dest": FILE_NAME}), (VLC,)),
    "vscode_config": Getter(fields({"vscode_extension_command": TEXT, "path": PATH, "dest": FILE_NAME})),
    "replay": Getter(broken="it takes a list of actions, and a getter is given its configuration, an object"),
    "conference_city_in_order": Getter(broken="it reads its file after closing it"),
    # Names of newer task files that our grader has and desktop-env 1.0.2 has not.
    "chrome_appearance_mode_ui": Getter(needs=(CDP,)),
}
EXTRA_GETTERS = frozenset({"chrome_appearance_mode_ui"})


def _metrics(names: str, compares: bool | None, **more: Any) -> dict[str, MetricType]:
    return dict.fromkeys(names.split(), MetricType(compares, **more))


_TABLE_RULES = (
    *("sheet_name", "sheet_data", "sheet_print", "sheet_fuzzy", "sparkline", "chart", "style", "freeze", "zoom"),
    *("data_validation", "row_props", "col_props", "filter", "pivot_table", "check_cell"),
)

METRICS: Mapping[str, MetricType] = {
    "infeasible": MetricType(None, None),
    **_metrics(
        "is_utc_0 check_text_enlarged has_page_numbers_in_footers evaluate_conversion evaluate_spacing"
        " evaluate_alignment get_unique_train_ids is_first_line_centered check_textbox_on_leftside"
        " check_triangle_position check_presenter_console_disable check_slide_numbers_color"
        " check_slide_orientation_Portrait check_left_panel",
        False,
    ),
    **_metrics(
        # basic_os, chrome
        "check_gnome_favorite_apps check_moved_jpgs is_in_vm_clickboard is_expected_tabs is_expected_bookmarks"
        " compare_pdfs is_cookie_deleted is_shortcut_on_desktop check_font_size check_enabled_experiments"
        " check_history_deleted is_expected_search_query is_expected_active_tab is_expected_url_pattern_match"
        " is_added_to_steam_cart is_expected_installed_extensions is_expected_active_tab_approximate"
        # docs
        " compare_font_names compare_subscript_contains compare_docx_lines check_highlighted_words"
        " evaluate_strike_through_last_paragraph check_italic_font_size_14 check_no_duplicates compare_init_lines"
        " find_default_font contains_page_break compare_docx_tables compare_line_spacing compare_insert_equation"
        " compare_highlighted_text compare_contains_image compare_docx_images"
        # general
        " check_csv run_sqlite3 check_list exact_match match_in_list is_in_list fuzzy_match check_include_exclude"
        " check_direct_json_object compare_time_in_speedtest_results is_included_all_json_objects"
        " is_gold_text_included_in_pdf check_line_number file_contains compare_terminal_and_txt fuzzy_place_math"
        " compare_python_pure_text diff_text_file"
        # gimp
        " check_structure_sim_resized check_contrast_increase_and_structure_sim"
        " check_saturation_increase_and_structure_sim check_image_size check_image_mirror"
        " check_palette_and_structure_sim check_green_background check_file_exists_and_structure_sim"
        " check_structure_sim check_config_status compare_image_list increase_saturation decrease_brightness"
        " check_file_exists compare_triangle_positions check_sharper check_image_file_size"
        # libreoffice, others, pdf, slides, table, thunderbird
        " check_libre_locale compare_epub check_mp3_meta check_pdf_pages check_image_stretch_and_center"
        " check_strikethrough evaluate_presentation_fill_to_rgb_distance check_transition check_page_number_colors"
        " check_auto_saving_time compare_conference_city_in_order check_thunderbird_prefs check_thunderbird_filter"
        # vlc, vscode
        " is_vlc_playing is_vlc_recordings_folder is_vlc_fullscreen compare_audios check_qt_bgcone"
        " check_one_instance_when_started_from_file check_qt_minimal_view check_qt_max_volume"
        " check_qt_slider_colours check_global_key_play_pause compare_result_files",
        True,
    ),
    **_metrics(
        "compare_htmls compare_archive compare_pdf_images evaluate_colored_words_in_tables compare_docx_files"
        " check_tabstops compare_docx_files_and_ignore_new_lines compare_references compare_unique_train_records"
        " literal_match compare_pptx_files compare_csv check_thunderbird_folder compare_images compare_text_file"
        " compare_config compare_answer is_extension_installed check_json_settings check_json_keybindings"
        " check_python_file_by_test_suite check_python_file_by_gold_file compare_zip_files",
        True,
        options=None,
    ),
    "compare_image_text": MetricType(True, needs=(OCR,)),
    "check_accessibility_tree": MetricType(True, frozenset({"osname"})),
    "check_json": MetricType(True, frozenset({"is_yaml"})),
    "check_brightness_decrease_and_structure_sim": MetricType(True, frozenset({"threshold"})),
    "compare_videos": MetricType(True, frozenset({"max_frames_to_check", "threshold"})),
    "check_html_background_image": MetricType(None),
    "compare_table": MetricType(
        None, None, {"rules": each(fields({"type": choice(*_TABLE_RULES)}), "a list of rules")}
    ),
    # Names of newer task files that our grader has and desktop-env 1.0.2 has not.
    "check_structure_sim_with_threshold": MetricType(True, frozenset({"threshold"})),
    "check_play_and_exit": MetricType(True),
}
EXTRA_METRICS = frozenset({"check_structure_sim_with_threshold", "check_play_and_exit"})

ELSEWHERE: Mapping[str, str] = {
    "chrome_color_scheme": "forks of OSWorld from 2026 have it",
    "compare_xlsx_files": "a fork of OSWorld from 2026 has it",
    "extensions_installed_from_shop": "desktop-env 1.0.2 defines it without offering it",
    "chrome_saved_address": "desktop-env 1.0.2 defines it without offering it",
}
"""Getters and metrics that task files may name and no evaluator here has → who has them."""
