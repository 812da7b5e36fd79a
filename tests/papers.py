"""PDF and DOCX files for the tests, written on the spot."""

from __future__ import annotations

from pathlib import Path

TO_UNICODE = (
    "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapType 2 def "
    "1 begincodespacerange <0000> <FFFF> endcodespacerange "
    "1 beginbfrange <0000> <FFFF> <0000> endbfrange endcmap end end"
)


def write_pdf(file: Path, pages: list[str]) -> Path:
    """A PDF of Chinese pages, a line of text a line; the codes of its font are Unicode's own."""
    objects: list[str] = []

    def add(body: str, stream: str | None = None) -> int:
        objects.append(body if stream is None else f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        return len(objects)

    cmap = add("", TO_UNICODE)
    descendant = add(
        "<< /Type /Font /Subtype /CIDFontType2 /BaseFont /Song /DW 1000"
        " /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) /Supplement 0 >> >>"
    )
    font = add(
        f"<< /Type /Font /Subtype /Type0 /BaseFont /Song /Encoding /Identity-H /ToUnicode {cmap} 0 R"
        f" /DescendantFonts [{descendant} 0 R] >>"
    )
    parent = len(objects) + 2 * len(pages) + 1
    kids = []
    for text in pages:
        shown = " T* ".join(f"<{line.encode('utf-16-be').hex()}> Tj" for line in text.split("\n") if line)
        content = add("", f"BT /F1 12 Tf 14 TL 50 700 Td {shown} ET" if text else "")
        kids.append(
            add(
                f"<< /Type /Page /Parent {parent} 0 R /MediaBox [0 0 595 842] /Contents {content} 0 R"
                f" /Resources << /Font << /F1 {font} 0 R >> >> >>"
            )
        )
    assert add(f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(f'{k} 0 R' for k in kids)}] >>") == parent
    root = add(f"<< /Type /Catalog /Pages {parent} 0 R >>")
    content, offsets = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    start = len(content)
    content += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    content += "".join(f"{offset:010d} 00000 n \n" for offset in offsets).encode()
    content += f"trailer << /Size {len(objects) + 1} /Root {root} 0 R >>\nstartxref\n{start}\n%%EOF\n".encode()
    file.write_bytes(content)
    return file


def write_docx(file: Path, paragraphs: list[tuple[str, str]], table: list[list[str]] | None = None) -> Path:
    """A DOCX of (style, text) paragraphs, such as ("Heading 1", "用法"), and a table behind them."""
    import docx

    document = docx.Document()
    for style, text in paragraphs:
        document.add_paragraph(text, style=style)
    if table:
        shown = document.add_table(rows=len(table), cols=len(table[0]))
        for row, cells in zip(shown.rows, table, strict=True):
            for cell, text in zip(row.cells, cells, strict=True):
                cell.text = text
    document.save(str(file))
    return file
