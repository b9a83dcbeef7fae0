//! The page's text, and how it becomes a report that is one file. Pure.

use crate::control::report::Report;

pub(super) const HTML: &str = include_str!("page.html");
pub(super) const CSS: &str = include_str!("page.css");
pub(super) const JS: &str = include_str!("page.js");

/// What the node's page may load: its own files, and the node's answers.
pub(super) const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                                 img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Where the files stand in the page.
const STYLE: &str = "<link rel=\"stylesheet\" href=\"page.css\">";
const SCRIPT: &str = "<script src=\"page.js\"></script>";

/// The report as one page that needs nothing else.
///
/// # Errors
/// When the report cannot be said in JSON.
pub fn of_report(report: &Report) -> serde_json::Result<String> {
    // In JSON a `<` can only stand in a text, where this means the same; so no text ends the script that it stands in.
    let data = serde_json::to_string(report)?.replace('<', "\\u003c");
    // Only scripts with this word run. A text in the report cannot hold it: it depends on all texts.
    let nonce = blake3::hash(data.as_bytes()).to_hex();
    let policy = format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'nonce-{nonce}'; \
         style-src 'nonce-{nonce}'; img-src data:; base-uri 'none'; form-action 'none'\">"
    );
    let style = format!("{policy}\n<style nonce=\"{nonce}\">\n{CSS}</style>");
    let script = format!(
        "<script id=\"report\" type=\"application/json\">{data}</script>\n<script nonce=\"{nonce}\">\n{JS}</script>"
    );
    let (head, rest) = HTML.split_once(STYLE).unwrap_or((HTML, ""));
    let (body, end) = rest.split_once(SCRIPT).unwrap_or((rest, ""));
    Ok([head, &style, body, &script, end].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::summary::Summary;
    use crate::export::Overview;

    fn report(error: &str) -> Report {
        let status = serde_json::from_value(serde_json::json!({
            "name": "web", "role": "pull", "phase": "pulling", "epoch": 0, "size": 4096, "block_size": 4096,
            "present_bytes": 0, "dirty_bytes": 0, "missing_bytes": 4096, "pulled_bytes": 0, "skipped_bytes": 0,
            "pull_rate": 0, "eta_s": null, "faults": { "count": 0, "p50_us": 0, "p99_us": 0, "max_us": 0 },
            "stalled_us": 0, "lease_remaining_ms": null, "link": "none", "frozen_ms": null, "upstream": "connecting",
            "clients": 0, "device": null, "peer": null, "container": null, "container_state": null,
            "paused": null, "last_error": error
        }))
        .unwrap();
        Report {
            schema: 1,
            version: "0".into(),
            made_at_ms: 0,
            summary: Summary::of(&status, &[], &[]),
            status,
            events: Vec::new(),
            history: Vec::new(),
            waits: Vec::new(),
            map: Overview { size: 4096, block_size: 4096, present: vec![0], dirty: vec![0], hot: vec![0] },
        }
    }

    #[test]
    fn each_file_stands_in_the_page_once_and_nothing_comes_from_elsewhere() {
        for mark in [STYLE, SCRIPT] {
            assert_eq!(HTML.matches(mark).count(), 1, "{mark}");
        }
        for text in [HTML, CSS, JS] {
            assert!(!text.contains("://") && !text.contains("@import") && !text.contains("url("), "{text}");
        }
        // What would end the elements that they are put into.
        assert!(!JS.contains("</script") && !CSS.contains("</style"));
    }

    #[test]
    fn a_report_is_whole_and_its_texts_cannot_leave_their_place() {
        let evil = report("</script><b id=harm>\u{2028}<!--<script>");
        let page = of_report(&evil).unwrap();
        assert!(!page.contains("<b id=harm>") && !page.contains("<!--<script>"), "{page}");
        assert_eq!(page.matches("</script>").count(), 2);
        assert!(page.trim_end().ends_with("</html>") && !page.contains("page.js\"") && !page.contains("page.css"));
        let start = page.find("type=\"application/json\">").unwrap() + "type=\"application/json\">".len();
        let data = &page[start..start + page[start..].find("</script>").unwrap()];
        assert_eq!(serde_json::from_str::<Report>(data).unwrap(), evil, "nothing is lost");
        let nonce = |page: &str| page.split("nonce-").nth(1).unwrap()[..64].to_owned();
        assert_ne!(nonce(&page), nonce(&of_report(&report("")).unwrap()));
    }
}
