"""The page as a person uses it, in a real Chromium without a window; skipped where there is none.

What it looked like is left as pictures in build/screenshots.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from papers import write_docx, write_pdf
from test_page import free_port, make_models

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "build" / "screenshots"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
expect = sync_api.expect
WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with a base, two adapters and a knowledge base, started as its user starts it."""
    root = tmp_path_factory.mktemp("page")
    words = make_models(root)
    port = free_port()
    command = [sys.executable, "gradio_demo.py", *words, "--use_cpu", "--port", str(port), "--max_new_tokens", "60"]
    command += ["--feedback_file", str(root / "feedback.jsonl")]
    with open(root / "log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + 180
        while b"page: http" not in (root / "log").read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, (root / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", root
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(address, chromium):
    """Open the page in a browser of its own; in the end, nothing must have been asked of another machine."""
    contexts, foreign, errors = [], [], []

    def open_in(**options):
        context = chromium.new_context(**{"locale": "zh-CN", "viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: foreign.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address[0])
        page.locator("#question textarea").wait_for()
        return page

    yield open_in
    for context in contexts:
        context.close()
    assert [url for url in foreign if not url.startswith((address[0], "data:", "blob:"))] == []
    assert errors == []


def picture(page, name):
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(400)  # transitions
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def ask(page, question):
    page.locator("#question textarea").fill(question)
    page.locator("#question textarea").press("Enter")


def answers(page):
    return page.locator("#chat .bot .message-content")


def wait_until_done(page):
    page.locator("#question .submit-button").wait_for()
    expect(page.locator("#question textarea")).to_be_enabled(timeout=WAIT)


def set_slider(page, label, value):
    page.locator("#side .toggle-button").click()
    field = page.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.press("Enter")
    page.locator("#side .toggle-button").click()


def without_sources(page):
    page.locator("#side .toggle-button").click()
    page.get_by_label("依据资料回答").uncheck()
    page.locator("#side .toggle-button").click()


def test_a_person_asks_watches_the_answer_come_stops_it_and_asks_again(open_page):
    page = open_page()
    expect(page.locator("#notice")).to_contain_text("不构成医疗建议")
    expect(page.locator("#notice")).to_contain_text("120")
    picture(page, "chat-zh-empty")
    without_sources(page)
    set_slider(page, "回答最多的词元数", 3000)
    ask(page, "高血压患者应该注意什么？")
    lengths = set()
    while len(lengths) < 3:  # it grows before the eyes
        lengths |= {len(text) for text in answers(page).all_inner_texts()}
    page.locator("#question .stop-button").click()
    wait_until_done(page)
    stopped = answers(page).first.inner_text()
    page.wait_for_timeout(1000)
    assert answers(page).first.inner_text() == stopped
    label = page.evaluate("getComputedStyle(document.querySelector('#chat .bot .message-content'), '::after').content")
    assert "AI 生成" in label
    set_slider(page, "回答最多的词元数", 20)
    ask(page, "那饮食呢？")
    answers(page).nth(1).wait_for()
    wait_until_done(page)
    picture(page, "chat-zh-turns")
    page.reload()
    page.locator("#question textarea").wait_for()
    page.get_by_text("高血压患者应该注意什么？").first.click()  # kept in the browser
    expect(answers(page)).to_have_count(2, timeout=WAIT)


def test_an_answer_is_retried_edited_liked_and_exported(open_page, address):
    page = open_page()
    without_sources(page)
    ask(page, "联系人：王小明，电话 13812345678，咳嗽怎么办？")
    answers(page).first.wait_for()
    wait_until_done(page)
    first = answers(page).first.inner_text()
    with page.expect_response(lambda response: "/queue/join" in response.url):
        page.locator("#chat button[aria-label='Retry'], #chat button[aria-label='重试']").first.click()
    page.wait_for_timeout(300)  # until the page says that it is busy
    wait_until_done(page)
    expect(answers(page).first).to_have_text(first, timeout=WAIT)  # greedy
    page.locator("#chat").get_by_role("button", name=re.compile("^(like|赞)$", re.IGNORECASE)).first.click()
    kept = address[1] / "feedback.jsonl"
    for _ in range(100):
        if kept.exists() and '"like"' in kept.read_text(encoding="utf-8"):
            break
        page.wait_for_timeout(50)
    text = kept.read_text(encoding="utf-8")
    assert "13812345678" not in text and "王小明" not in text and "[电话]" in text
    with page.expect_download() as download:
        page.locator("#export-json").click()
    row = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert row["ai_generated"] is True and row["model"]["weights"] and row["messages"][1]["content"]
    with page.expect_download() as download:
        page.locator("#export-md").click()
    assert "人工智能生成" in Path(download.value.path()).read_text(encoding="utf-8")


def test_red_flags_bring_a_referral_above_the_answer(open_page):
    page = open_page()
    ask(page, "我突然胸口剧烈疼痛，出冷汗")
    warning = page.locator("#chat .thought-group")
    expect(warning).to_contain_text("120", timeout=WAIT)
    expect(warning).to_contain_text("胸痛可能是")
    wait_until_done(page)
    picture(page, "chat-zh-referral")
    label = "getComputedStyle(document.querySelector('#chat .thought-group .message-content'), '::after').content"
    assert page.evaluate(label) == "none"  # written by people
    ask(page, "没有胸痛，只是咳嗽")
    expect(page.locator("#chat .user")).to_have_count(2, timeout=WAIT)
    wait_until_done(page)
    expect(warning).to_have_count(1)


def test_an_answer_names_its_sources(open_page):
    page = open_page()
    ask(page, "孕晚期可以用布洛芬吗？")
    source = page.locator("#sources .source").first
    expect(source).to_contain_text("布洛芬", timeout=WAIT)
    expect(source).to_contain_text("孕晚期禁用")
    expect(source).to_contain_text("相关度")
    wait_until_done(page)
    picture(page, "chat-zh-sources")


def test_a_dropped_file_is_a_knowledge_base_of_its_session_alone(open_page, tmp_path):
    page, other = open_page(), open_page()
    leaflet = tmp_path / "华法林说明书.txt"
    leaflet.write_text("华法林钠片\n注意事项：服药期间避免大量食用菠菜。<b>慎用</b>\n", encoding="utf-8")
    page.locator("#files input[type=file]").set_input_files(leaflet)
    expect(page.locator("#files-note")).to_contain_text("1 个文件", timeout=WAIT)
    for asking in (page, other):
        ask(asking, "华法林服药期间避免吃菠菜吗？")
    expect(page.locator("#sources .source")).to_contain_text("菠菜", timeout=WAIT)
    expect(page.locator("#sources .source")).to_contain_text("<b>慎用</b>")  # as text
    expect(other.locator("#sources")).to_contain_text("没有足够相关", timeout=WAIT)
    for asking in (page, other):
        wait_until_done(asking)
    picture(page, "chat-zh-file")


def test_pdf_and_word_files_answer_with_their_pages(open_page, tmp_path):
    page = open_page()
    pages = ["华法林钠片说明书", "注意事项\n服药期间避免大量食用菠菜。"]
    guide = write_docx(
        tmp_path / "用药指导.docx", [("Heading 1", "用药指导"), ("Normal", "地高辛中毒的早期表现是恶心和黄视。")]
    )
    page.locator("#files input[type=file]").set_input_files([write_pdf(tmp_path / "华法林.pdf", pages), guide])
    expect(page.locator("#files-note")).to_contain_text("2 个文件", timeout=WAIT)
    ask(page, "华法林服药期间避免吃菠菜吗？")
    expect(page.locator("#sources .source").first).to_contain_text("华法林.pdf · 第 2 页", timeout=WAIT)
    expect(page.locator("#sources .source").first).to_contain_text("菠菜")
    wait_until_done(page)
    ask(page, "地高辛中毒的早期表现有哪些？")
    expect(page.locator("#sources .source").first).to_contain_text("用药指导.docx", timeout=WAIT)
    expect(page.locator("#sources .source").first).to_contain_text("黄视")
    wait_until_done(page)
    picture(page, "chat-zh-files")
    scan = write_pdf(tmp_path / "扫描件.pdf", [""])
    page.locator("#files input[type=file]").set_input_files(scan)  # beside the others
    expect(page.locator("#files-note")).to_contain_text("1 × 没有文字", timeout=WAIT)


def test_models_are_compared_blind_and_voted_on(open_page):
    page = open_page()
    page.get_by_role("tab", name="比较模型").click()
    stop = page.locator("#compare-stop")
    expect(stop).to_be_disabled()
    page.locator("#compare-ask").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("请先输入问题")
    expect(stop).to_be_disabled(timeout=WAIT)
    page.locator("#compare-question textarea").fill("阿莫西林有哪些不良反应？")
    set_slider(page, "回答最多的词元数", 3000)
    page.locator("#compare-ask").click()
    expect(stop).to_be_enabled(timeout=WAIT)
    stop.click()
    expect(stop).to_be_disabled(timeout=WAIT)
    set_slider(page, "回答最多的词元数", 20)
    page.locator("#compare-ask").click()
    page.locator("#vote-A").wait_for()
    expect(stop).to_be_disabled(timeout=WAIT)
    columns = page.locator(".candidate:visible")
    assert columns.count() == 3
    for place in range(3):
        expect(columns.nth(place)).to_contain_text(re.compile(r"首词 .* 词元/秒"))
    assert not any(name in columns.nth(place).inner_text() for place in range(3) for name in ("base", "sft", "dpo"))
    picture(page, "compare-zh-blind")
    page.locator("#vote-B").click()
    expect(columns.nth(0)).to_contain_text(re.compile("· (base|sft|dpo)"), timeout=WAIT)
    expect(page.locator("#tally")).to_contain_text("1 / 1")
    picture(page, "compare-zh-voted")


def test_the_page_fits_a_telephone_and_the_dark(open_page):
    phone = open_page(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    ask(phone, "感冒怎么办？")
    answers(phone).first.wait_for()
    wait_until_done(phone)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390  # nothing to scroll sideways
    background = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60
    picture(phone, "chat-phone-dark")
    dark = open_page(color_scheme="dark")
    picture(dark, "chat-zh-dark")


def test_an_english_browser_gets_english(open_page):
    page = open_page(locale="en-US")
    expect(page.locator("#notice")).to_contain_text("not medical advice")
    expect(page.get_by_role("tab", name="Internal medicine")).to_be_visible()
    expect(page.get_by_role("tab", name="内科")).to_have_count(0)
    ask(page, "I have chest pain")
    expect(page.locator("#chat .thought-group")).to_contain_text("heart attack", timeout=WAIT)
    wait_until_done(page)
    expect(answers(page).last).to_contain_text("nothing relevant enough")
    page.locator("#side .toggle-button").click()
    expect(page.locator("#side")).to_contain_text("Temperature")
    expect(page.get_by_label("Seed")).to_have_value("")
    picture(page, "chat-en-settings")
