//! The pages for a browser: the node's own, on `serve --http`, and the report's, in a file.
//!
//! The page is for looking only. It is served on loopback, to requests that name this host (a name that somebody else's
//! DNS points here is refused), answers GET and nothing else, and asks for nothing from elsewhere: its script, its style
//! and its pictures are its own, and its Content-Security-Policy lets no other in. The figures come from the same handlers
//! as on the control socket.

mod page;

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::control::server::views;
use crate::error::{Failure, Outcome};
use crate::limits::WEB_REQUESTS;
use crate::node::Node;
pub use page::of_report;

/// How long answers that are on their way may take when the node stops.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// The page's port, listened on.
pub struct WebPage {
    listener: TcpListener,
}

impl WebPage {
    /// Listens on `HOST:PORT`, which must be loopback: whoever reaches it sees all disks, and nobody is asked who he is.
    pub async fn bind(text: &str) -> Outcome<Self> {
        let wrong = |why: String| Failure::usage(format!("--http {text}: {why}"));
        let addresses: Vec<SocketAddr> = text
            .to_socket_addrs()
            .map_err(|error| wrong(format!("{error}; write it as HOST:PORT, for example 127.0.0.1:8080")))?
            .collect();
        if addresses.is_empty() || addresses.iter().any(|address| !address.ip().is_loopback()) {
            return Err(wrong(
                "the page has no password, so it is served on loopback only: say 127.0.0.1:PORT, and reach it from \
                 elsewhere with `ssh -L PORT:127.0.0.1:PORT HOST`"
                    .into(),
            ));
        }
        let listener = TcpListener::bind(&addresses[..])
            .await
            .map_err(|error| Failure::failed(format!("cannot serve the page on {text}: {error}")))?;
        Ok(Self { listener })
    }

    /// Where it listens.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Serves until `stop`.
    pub async fn serve(self, node: Arc<Node>, stop: CancellationToken) {
        let served = axum::serve(self.listener, router(node)).with_graceful_shutdown(stop.clone().cancelled_owned());
        let outcome = tokio::select! {
            outcome = served => outcome,
            () = async { stop.cancelled().await; tokio::time::sleep(LAST_ANSWERS).await } => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "the page is gone");
        }
    }
}

fn router(node: Arc<Node>) -> Router {
    let asset =
        |kind: &'static str, text: &'static str| get(move || async move { ([(header::CONTENT_TYPE, kind)], text) });
    views()
        .with_state(node)
        .route("/", asset("text/html; charset=utf-8", page::HTML))
        .route("/page.css", asset("text/css; charset=utf-8", page::CSS))
        .route("/page.js", asset("text/javascript; charset=utf-8", page::JS))
        .fallback(|| async { (StatusCode::NOT_FOUND, "there is no such page; all there is to see is at /\n") })
        .layer(from_fn_with_state(Arc::new(Semaphore::new(WEB_REQUESTS)), few))
        .layer(from_fn(guarded))
}

/// So many answers are made at a time; others wait.
async fn few(State(permits): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    let _permit = permits.acquire().await;
    next.run(request).await
}

/// Lets nothing through that is not a GET of this host's own page.
async fn guarded(request: Request, next: Next) -> Response {
    let mut response = if request.method() != Method::GET {
        let text = "this page only shows; commands go to the node's control socket, see `lazy-migrate --help`\n";
        (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET")], text).into_response()
    } else if !asked_for_this_host(&request) {
        let text = "this page is served to this host only, as localhost, 127.0.0.1 or [::1]\n";
        (StatusCode::MISDIRECTED_REQUEST, text).into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, page::POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

/// A page from elsewhere whose name was made to point here says that name: both places where a name can stand are looked at.
fn asked_for_this_host(request: &Request) -> bool {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let named = request.uri().authority().map(Authority::as_str);
    host.is_some_and(is_this_host) && named.is_none_or(is_this_host)
}

fn is_this_host(authority: &str) -> bool {
    let Ok(authority) = authority.parse::<Authority>() else { return false };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_nobody_can_point_elsewhere_are_this_host() {
        for good in ["localhost", "localhost:8080", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "127.0.0.2"] {
            assert!(is_this_host(good), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "localhost.evil.example:8080",
            "127.0.0.1.evil.example",
            "10.0.0.1:8080",
            "0.0.0.0",
            "a b",
        ] {
            assert!(!is_this_host(bad), "{bad}");
        }
    }

    #[tokio::test]
    async fn an_address_that_others_reach_is_refused() {
        for bad in ["0.0.0.0:0", "[::]:0", "192.0.2.1:8080", "127.0.0.1", "x"] {
            let failure = WebPage::bind(bad).await.err().unwrap();
            assert_eq!(failure.kind, crate::error::Kind::Usage, "{failure}");
        }
        assert!(WebPage::bind("127.0.0.1:0").await.unwrap().address().unwrap().ip().is_loopback());
    }
}
