//! A page for people who come with a browser.

use std::fmt::Write;

use axum::response::Html;

use super::openapi;

/// This list, as a page.
#[utoipa::path(get, path = "/", tag = "node", responses(
    (status = 200, description = "The list of endpoints.", body = String, content_type = "text/html"),
))]
pub async fn index() -> Html<String> {
    let mut rows = String::new();
    for (method, path, summary) in openapi::operations() {
        // Only paths without parameters make sense as links.
        let shown = if method == "GET" && !path.contains('{') && path != "/v1/lookup" {
            format!("<a href=\"{path}\">{path}</a>")
        } else {
            path
        };
        writeln!(rows, "<tr><td><code>{method}</code></td><td><code>{shown}</code></td><td>{summary}</td></tr>")
            .expect("writing to a string does not fail");
    }
    Html(format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>Drava</title>\n\
         <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:3rem auto;padding:0 1rem}}\
         td{{padding:.2rem 1rem .2rem 0;vertical-align:top}}</style>\n\
         <h1>Drava {}</h1>\n<p>The admin of this node. A topic's name in a path is short (<code>orders</code>) or full \
         (<code>public/default/orders</code>).</p>\n<table>\n{rows}</table>\n</html>\n",
        env!("CARGO_PKG_VERSION")
    ))
}
