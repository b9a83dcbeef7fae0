//! What the node's other pulls hear of a disk's clients.

use std::sync::Arc;

use super::testing::{Lab, Source, eventually, quiet, read};
use crate::fetch::Traffic;

#[tokio::test]
async fn a_fetch_counts_for_the_other_pulls_as_long_as_somebody_waits_for_it() {
    let (source, traffic) = (Source::new(Source::pattern(1 << 20)), Arc::new(Traffic::default()));
    source.close_valve();
    let lab = Lab::new(source, |config| {
        quiet(config);
        config.traffic = traffic.clone();
    })
    .await;
    let export = lab.export.clone();
    let reader = tokio::spawn(async move { read(&export, 8192, 4096).await });
    eventually("the fetch", || traffic.demands()).await;
    lab.source.let_through(1);
    reader.await.unwrap().unwrap();
    assert!(!traffic.demands(), "they give way to nobody");
}
