"""The interactive report: one self-contained HTML page of one run or of several, which needs no network.

    from rlhfreports.page.data import Page, Run
    from rlhfreports.page.render import write_page
    write_page(Page.of([run]), "index.html")

``rlhfreports.page.data`` says what a run is made of. ``rlhfreports.page.sections`` lists the sections; a new section is
one function there. The page needs Altair, vl-convert, itables and Jinja2.
"""
